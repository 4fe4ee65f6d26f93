"""The limit of a step's own tokens' log-probs: no sound step is below it, and a ruined policy is."""

import math

import numpy as np
import pytest

from treepo.learning.soundness import WeightCheck, ruin


def log_probs(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("tokens", [1, 2, 30, 500])
def test_a_step_that_moves_probabilities_by_a_fifth_passes(scale: float, tokens: int) -> None:
    """From nearly uniform policies to nearly deterministic ones."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = scale * rng.standard_normal((tokens, 64))
        old, new = log_probs(logits), log_probs(logits + 0.2 * rng.standard_normal(logits.shape))
        sampled = [rng.choice(64, p=np.exp(row)) for row in old]
        now, before = (float(values[np.arange(tokens), sampled].mean()) for values in (new, old))
        assert ruin(WeightCheck(1.0, now, before, tokens)) is None


@pytest.mark.parametrize("vocabulary", [320, 150_000])
def test_a_uniform_guess_after_a_trained_policy_is_ruin(vocabulary: int) -> None:
    assert ruin(WeightCheck(3e5, -math.log(vocabulary), -0.1, 512)) is not None


def test_log_probs_of_any_size_are_ruin_even_for_few_tokens() -> None:
    assert ruin(WeightCheck(1e6, -1e3, -5.0, 3)) is not None
    assert ruin(WeightCheck(1.0, math.nan, -5.0, 512)) is not None
