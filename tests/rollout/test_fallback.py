"""Fallback: the leaves that are continued and where they are cut."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.config.sampling import SamplingConfig
from treepo.rollout.fallback import cut_point, order
from treepo.rollout.policies import CUTS, Candidate
from treepo.tree import Stop

DRAWS = 4000


def config(**fallback: Any) -> SamplingConfig:
    values = {"segment_tokens": 8, "max_depth": 4, "fallback": {"block_tokens": 4, **fallback}}
    return SamplingConfig.model_validate(values)


def candidate(length: int, stop: Stop = Stop.BOXED, log_probs: np.ndarray | None = None) -> Candidate:
    values = np.linspace(-1, 0, length, dtype=np.float32) if log_probs is None else log_probs
    boundaries = [*range(8, length, 8), length]
    return Candidate(stop, values, boundaries, below=[(0, 0)] * len(boundaries))


@pytest.mark.parametrize(
    ("cut", "aligned"),
    [(cut, aligned) for cut in CUTS for aligned in (True, False) if aligned or cut != "pivot"],
)
@given(length=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_a_cut_leaves_something_to_sample(cut: str, aligned: bool, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    leaf = candidate(length, log_probs=-rng.random(length, dtype=np.float32))
    kept = cut_point(leaf, config(cut=cut, aligned=aligned), rng)
    assert 0 <= kept < length
    assert kept <= 3 * 8  # room for one more segment under max_depth
    assert not aligned or kept in (0, *leaf.boundaries)
    assert length >= 8 or kept == 0 or not (aligned or cut == "random")


@pytest.mark.parametrize("cut", ["min_log_prob", "block", "inverse_block"])
def test_a_response_shorter_than_a_segment_is_cut_unless_a_window_forbids_it(cut: str) -> None:
    """As in the official code. All but one token are equally likely, and it is in the second block."""
    log_probs = np.full(7, -1, dtype=np.float32)
    log_probs[5] = -60 if cut != "inverse_block" else -1e-3
    log_probs[4:] = log_probs[5] if cut != "min_log_prob" else log_probs[4:]
    if cut == "inverse_block":
        log_probs[:4] = -60
    leaf, rng = candidate(7, log_probs=log_probs), np.random.default_rng(0)
    free: dict[str, Any] = {"cut": cut, "aligned": False}
    assert cut_point(leaf, config(**free), rng) == (5 if cut == "min_log_prob" else 4)
    assert cut_point(leaf, config(**free, window_tokens=7), rng) > 0
    assert cut_point(leaf, config(**free, window_tokens=8), rng) == 0
    assert cut_point(leaf, config(cut=cut), rng) == 0  # no segment boundary lies before it


def cuts(length: int, draws: int = DRAWS, **fallback: Any) -> Counter[int]:
    rng = np.random.default_rng(0)
    return Counter(cut_point(candidate(length), config(**fallback), rng) for _ in range(draws))


def test_random_cuts_are_uniform_over_the_windows() -> None:
    counts = cuts(30)
    assert sorted(counts) == [0, 8, 16, 24]
    # Four equal chances: a count's standard deviation is √(4000 · 3/16) ≈ 27, five of them are 137.
    assert all(abs(count - DRAWS / 4) < 137 for count in counts.values())


def test_random_cuts_stay_within_the_last_windows() -> None:
    assert sorted(cuts(30, max_windows=2)) == [16, 24]
    assert sorted(cuts(30, window_tokens=16)) == [0, 16]
    assert sorted(cuts(30, window_tokens=5, aligned=False)) == [0, 5, 10, 15, 20, 24]  # 25 is too deep


def test_min_log_prob_cuts_at_the_least_likely_token() -> None:
    log_probs = np.full(30, -1, dtype=np.float32)
    log_probs[19] = -5
    rng = np.random.default_rng(0)
    leaf = candidate(30, log_probs=log_probs)
    assert cut_point(leaf, config(cut="min_log_prob", aligned=False), rng) == 19
    assert cut_point(leaf, config(cut="min_log_prob"), rng) == 16


@pytest.mark.parametrize(("cut", "sign"), [("block", -1), ("inverse_block", 1)])
def test_blocks_are_drawn_by_softmax(cut: str, sign: int) -> None:
    means = np.array([-2.0, -1.0, -0.5, 0.0])
    leaf = candidate(14, log_probs=np.repeat(means, 4)[:14].astype(np.float32))
    rng = np.random.default_rng(0)
    drawn = Counter(cut_point(leaf, config(cut=cut, aligned=False), rng) for _ in range(DRAWS))
    chances = np.exp(sign * means) / np.exp(sign * means).sum()
    for block, chance in enumerate(chances):
        # Five standard deviations of a count of that many draws.
        assert abs(drawn[4 * block] - DRAWS * chance) < 5 * np.sqrt(DRAWS * chance * (1 - chance))


LEAVES = [
    candidate(30, Stop.LIMIT),
    candidate(10, Stop.BOXED),
    candidate(20, Stop.REPETITION),
    candidate(12, Stop.EOS),
    candidate(26, Stop.BOXED),
    candidate(28, Stop.DEPTH),
]


def orders(**fallback: Any) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [order(LEAVES, config(**fallback), rng) for _ in range(DRAWS)]


def test_strictly_the_best_endings_first() -> None:
    assert orders(order="finished_strict")[0] == [1, 4, 3, 5, 0, 2]


@pytest.mark.parametrize(
    ("policy", "weights"),
    [("finished", [3, 7, 2, 5, 7, 4]), ("longer", [30, 10, 20, 12, 26, 28]), ("random", [1] * 6)],
)
def test_the_first_is_drawn_by_weight(policy: str, weights: list[int]) -> None:
    drawn = orders(order=policy)
    assert all(sorted(permutation) == list(range(6)) for permutation in drawn)
    first = Counter(permutation[0] for permutation in drawn)
    for index, weight in enumerate(weights):
        chance = weight / sum(weights)
        # Five standard deviations of a count of that many draws.
        assert abs(first[index] - DRAWS * chance) < 5 * np.sqrt(DRAWS * chance * (1 - chance))


def test_boxed_or_eos_admits_only_those_endings() -> None:
    drawn = orders(order="boxed_or_eos")
    assert {tuple(sorted(permutation)) for permutation in drawn} == {(1, 3, 4)}
    assert len({tuple(permutation) for permutation in drawn}) == 6


def test_boxed_long_admits_only_long_boxed_leaves() -> None:
    assert orders(order="boxed_long", min_windows=2)[0] == [4]
    assert orders(order="boxed_long", min_windows=4)[0] == []
