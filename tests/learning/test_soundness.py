"""The limit of a step's own tokens' log-probs: no policy is below it by chance, and a ruined one is."""

import numpy as np
import pytest

from treepo.learning.soundness import WeightCheck, log_prob_limit, ruin


def log_probs(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("tokens", [1, 2, 30, 500])
def test_a_policys_own_tokens_pass(scale: float, tokens: int) -> None:
    """Nearly uniform policies too, and one clipped update lower."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        log_p = log_probs(scale * rng.standard_normal((tokens, 64)))
        sampled = np.array([rng.choice(64, p=np.exp(row)) for row in log_p])
        own = log_p[np.arange(tokens), sampled]
        assert ruin(WeightCheck(1.0, own.mean() + np.log(0.8), tokens, 64)) is None


@pytest.mark.parametrize("vocabulary", [64, 150_000])
def test_a_ruined_policys_do_not(vocabulary: int) -> None:
    """Logits of any size, which have nothing to do with the tokens."""
    rng = np.random.default_rng(0)
    log_p = log_probs(1e3 * rng.standard_normal((20, vocabulary)))
    others = log_p[np.arange(20), rng.integers(0, vocabulary, 20)]
    assert ruin(WeightCheck(1.0, others.mean(), 20, vocabulary)) is not None


def test_the_limit_is_that_of_a_uniform_guess_with_a_margin() -> None:
    assert log_prob_limit(500, 100) == pytest.approx(-np.log(100) - 1.1)
