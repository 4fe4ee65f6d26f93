"""Judges the weights after a batch's optimizer steps: whether they can be those of a policy that learns."""

import math
from dataclasses import dataclass

MARGIN = 1.0
"""Nats that a sound update may take from the mean log-prob of the tokens it trains."""
CERTAINTY = 50.0
"""A policy fails the check of its own tokens by chance with a probability below exp(-50)."""


@dataclass(frozen=True, slots=True)
class WeightCheck:
    """What the trainer measured of its weights after a batch's optimizer steps.

    largest: the largest absolute value of a weight; inf if one is not finite. log_prob: the mean log-prob, in
    nats, of `tokens` tokens that the last optimizer step trained, under the new weights; NaN if one is.
    vocabulary: the model's tokens.
    """

    largest: float
    log_prob: float
    tokens: int
    vocabulary: int


def log_prob_limit(tokens: int, vocabulary: int) -> float:
    """The mean log-prob of `tokens` trained tokens, in nats, below which the weights are ruined:

        -ln V - 1 - 50 / n

    Guessing uniformly among the V tokens of the vocabulary gives -ln V. A policy p gives its own n sampled
    tokens y less than that hardly ever. Each factor of the product of 1 / (V p(y)) has an expectation of at
    most 1 given the tokens above it, because p(y) / (V p(y)) sums to at most V / V; by Markov's inequality
    the product exceeds exp(n m), and so the mean of ln p(y) is below -ln V - m, with a probability of at most
    exp(-n m). With m = 50 / n that is exp(-50), also for a model with random weights, whose policy is nearly
    uniform itself.

    The batch was sampled by the weights before the step, and a clipped update moves few of its ratios beyond
    1 - `clip_low`, by 0.2 nats. One nat, a mean ratio of 0.37, leaves room for all that a sound update can
    do. A trained model is far from the limit: its tokens have about -0.3, and with 150 000 tokens the limit
    is near -13. Weights that a step has ruined have logits of any size, and log-probs of -100 and less.

    So the check finds ruin, not a policy that learns the wrong thing.
    """
    return -math.log(vocabulary) - MARGIN - CERTAINTY / max(tokens, 1)


def ruin(check: WeightCheck) -> str | None:
    """What shows that the weights are ruined; None if nothing does."""
    if not math.isfinite(check.largest):
        return "a weight is not finite"
    limit = log_prob_limit(check.tokens, check.vocabulary)
    if check.log_prob >= limit:
        return None
    return (
        f"under them {check.tokens} tokens that it trained have a mean log-prob of {check.log_prob:.4g}, "
        f"below {limit:.4g} (guessing uniformly among {check.vocabulary} tokens has "
        f"{-math.log(check.vocabulary):.4g}); the largest weight is {check.largest:.3g}"
    )
