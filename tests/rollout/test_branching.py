"""Budgets and their allocation: bounds that hold for any state, and naive versions of the formulas."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.config.sampling import AllocationConfig, SamplingConfig
from treepo.rollout import branching
from treepo.rollout.policies import ALLOCATIONS, largest_remainder


def config(**values: Any) -> SamplingConfig:
    return SamplingConfig(**{"segment_tokens": 8, **values})


@given(
    budget=st.sampled_from([{}, {"budget": "tokens", "tokens_per_step": 40}]),
    factor=st.integers(1, 9),
    active=st.integers(1, 20),
    finished_now=st.integers(0, 20),
    earlier=st.integers(0, 20),
)
def test_a_step_has_a_child_for_each_path_and_no_leaf_too_many(
    budget: dict[str, Any], factor: int, active: int, finished_now: int, earlier: int
) -> None:
    finished = finished_now + earlier
    children = branching.step_budget(config(**budget), factor, 16, active, finished_now, finished)
    assert children >= active
    assert children == active or finished + children <= 16
    saturated = active + finished >= 16
    assert not saturated or children == active


def test_a_finished_path_passes_its_share_on() -> None:
    assert branching.step_budget(config(), 2, 16, active=3, finished_now=1, finished=1) == 8


@pytest.mark.parametrize("policy", list(ALLOCATIONS))
@given(
    paths=st.lists(st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=20), min_size=1, max_size=8),
    extra=st.integers(0, 20),
)
def test_the_whole_budget_is_divided(policy: str, paths: list[list[float]], extra: int) -> None:
    sampling = config(allocation={"policy": policy})
    budget = len(paths) + extra
    children = branching.allocate(sampling, budget, paths, lambda path: np.array(path, np.float32), step=0)
    assert sum(children) == budget
    assert min(children) >= 1


def test_average_gives_the_remainder_to_the_last_path() -> None:
    assert branching.allocate(config(), 8, [1, 2, 3], lambda _: np.zeros(1), step=0) == [2, 2, 4]


@pytest.mark.parametrize(
    ("policy", "favoured"),
    [("low_sum", 1), ("high_sum", 0), ("low_mean", 2), ("high_mean", 1), ("low_last", 0), ("high_last", 2)],
)
def test_each_policy_favours_its_paths(policy: str, favoured: int) -> None:
    paths = [
        np.array([-1.0, -1.0, -6.0, -6.0]),  # sum −14, mean −3.5, last two −6
        np.array([-1.0] * 30),  # sum −30, mean −1, last two −1
        np.array([-9.0, -9.0, 0.0, 0.0]),  # sum −18, mean −4.5, last two 0
    ]
    sampling = config(segment_tokens=2, allocation={"policy": policy, "temperature": 0.1})
    children = branching.allocate(sampling, 10, paths, lambda path: path, step=0)
    assert children[favoured] == max(children) == 8


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9), st.integers(0, 30))
def test_largest_remainders(weights: list[float], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    result = largest_remainder(shares, total)
    assert sum(result) == total
    assert all(math.floor(share * total) <= got for share, got in zip(shares, result, strict=True))
    remainders = [share * total - math.floor(share * total) for share in shares]
    raised = [r for r, s, got in zip(remainders, shares, result, strict=True) if got > math.floor(s * total)]
    kept = [r for r, s, got in zip(remainders, shares, result, strict=True) if got == math.floor(s * total)]
    assert max(kept, default=0) <= min(raised, default=1)


def test_the_temperature_follows_half_a_sine() -> None:
    fixed = AllocationConfig(policy="low_mean", temperature=2.0)
    assert branching.allocation_temperature(fixed, 50) == 2.0
    moving = AllocationConfig(
        policy="low_mean", temperature=5, schedule="sinusoidal", final_temperature=1, schedule_steps=100
    )
    # Sines of multiples of a quarter turn, exact up to rounding.
    assert branching.allocation_temperature(moving, 0) == pytest.approx(5, abs=1e-12)
    assert branching.allocation_temperature(moving, 50) == pytest.approx(3, abs=1e-12)
    assert branching.allocation_temperature(moving, 100) == pytest.approx(1, abs=1e-12)
    assert branching.allocation_temperature(moving, 999) == pytest.approx(1, abs=1e-12)
    values = [branching.allocation_temperature(moving, step) for step in range(101)]
    assert values == sorted(values, reverse=True)


def test_a_token_cap_allows_as_many_leaves_as_the_rest_of_it_pays_for() -> None:
    capped = config(cap="response_tokens", tree_response_tokens=100, min_width=2, width=8)
    assert branching.leaf_bound(capped, 8, [20, 20], [12, 12]) == 2 + 60 // (12 + 8)
    assert branching.leaf_bound(capped, 8, [20, 20], []) == 2 + 60 // 20
    assert branching.leaf_bound(capped, 8, [150], [8]) == 2  # nothing is left, but min_width is 2
    assert branching.leaf_bound(capped, 8, [1], []) == 8
    assert branching.leaf_bound(config(), 16, [10**6] * 3, [8]) == 16


def test_ranges_are_drawn_from_both_ends_included() -> None:
    rng = np.random.default_rng(0)
    ranged = config(initial_branching="2-4", budget="random", branching="1-3")
    assert {branching.initial_children(ranged, rng) for _ in range(200)} == {2, 3, 4}
    assert {branching.branching_factor(ranged, rng) for _ in range(200)} == {1, 2, 3}
    tokens = config(budget="tokens", tokens_per_step=1000, width=5)
    assert branching.initial_children(tokens, rng) == 5
    assert branching.branching_factor(tokens, rng) == 125


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"branching": "2-4"}, "budget = fixed with branching = 2-4"),
        ({"budget": "random"}, "budget = random with branching = 2"),
        ({"budget": "tokens"}, "tokens_per_step = None"),
        ({"tokens_per_step": 4096}, "budget = fixed with tokens_per_step = 4096"),
        ({"budget": "tokens", "tokens_per_step": 7}, "tokens_per_step = 7 is less than segment_tokens = 8"),
        ({"cap": "response_tokens"}, "tree_response_tokens = None"),
        ({"tree_response_tokens": 9}, "cap = trajectories with tree_response_tokens = 9"),
        ({"cap": "response_tokens", "tree_response_tokens": 7}, "tree_response_tokens = 7 is less than"),
        ({"min_width": 17}, "min_width = 17 is more than width = 16"),
        ({"min_width": 2}, "min_width = 2 does nothing with cap = trajectories"),
        ({"initial_branching": "2-20"}, "initial_branching = 2-20 is more than width = 16"),
        ({"initial_branching": "4-2"}, "'4-2' is neither"),
        ({"branching": 0}, "0 is neither"),
        ({"fallback": {"window_tokens": 12}}, "fallback.window_tokens = 12 is not a multiple of"),
        ({"fallback": {"min_windows": 2}}, "order = boxed_or_eos with min_windows = 2"),
        ({"fallback": {"order": "boxed_long"}}, "order = boxed_long with min_windows = None"),
        ({"fallback": {"cut": "block", "max_windows": 2}}, "max_windows = 2 does nothing with cut = block"),
        ({"allocation": {"schedule": "sinusoidal", "schedule_steps": 3}}, "needs final_temperature"),
        ({"allocation": {"final_temperature": 2.0}}, "final_temperature = 2.0 does nothing"),
    ],
)
def test_a_bad_combination_names_its_numbers(values: dict[str, Any], shown: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as error:
        config(**values)
    assert shown in str(error.value)


def test_sequential_mode_does_not_look_at_the_branching() -> None:
    assert config(mode="sequential", width=1).width == 1


def test_a_token_cap_limits_the_initial_branching_of_a_range_only() -> None:
    cap = {"cap": "response_tokens", "tree_response_tokens": 31}  # pays for three segments of 8
    rng = np.random.default_rng(0)
    drawn = {branching.initial_children(config(initial_branching="2-8", **cap), rng) for _ in range(200)}
    assert drawn == {2, 3}
    assert branching.initial_children(config(initial_branching=8, **cap), rng) == 8
    free = {branching.initial_children(config(initial_branching="2-8"), rng) for _ in range(200)}
    assert free == set(range(2, 9))


@given(
    log_probs=st.lists(st.floats(-30, 0, width=16), min_size=1, max_size=30),
    window=st.integers(1, 9),
)
def test_surprise_is_the_window_with_the_lowest_mean_log_prob(log_probs: list[float], window: int) -> None:
    at = branching.place(
        config(branch={"at": "surprise", "window_tokens": window}), np.array(log_probs, np.float32)
    )
    size = min(window, len(log_probs))
    sums = [math.fsum(log_probs[start : start + size]) for start in range(len(log_probs) - size + 1)]
    # Sums of numbers with 11 bits are exact in float64, so the first of equal windows is the same one.
    assert at == sums.index(min(sums))


def test_paths_branch_at_their_end_by_default() -> None:
    assert branching.place(config(), np.array([-1, -9, -1], np.float32)) == 3
    assert branching.may_branch(config(), 1)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (
            {"branch": {"from_depth": 4}, "max_depth": 4},
            "branch.from_depth = 4 with max_depth = 4: no path would branch; less than 4 is allowed",
        ),
        (
            {"branch": {"window_tokens": 2}},
            "window_tokens = 2 does nothing with at = end; surprise is allowed",
        ),
    ],
)
def test_places_that_cannot_work_are_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        config(**values)
