"""Judges the weights after a batch's optimizer steps: whether they can be those of a policy that learns."""

import math
from dataclasses import dataclass

MARGIN = 1.0
"""Nats that a sound step may take from the mean log-prob of the tokens it trains."""
CHANCE = 50.0
"""Nats that chance may take from the sum of a few tokens' log-probs."""


@dataclass(frozen=True, slots=True)
class WeightCheck:
    """What the trainer measured of its weights after a batch's optimizer steps.

    largest: the largest absolute value of a weight; inf if one is not finite. log_prob: the mean log-prob, in
    nats, of `tokens` tokens that the last optimizer step trained, under the new weights; NaN if one is.
    before: the mean log-prob of the same tokens before the batch's first optimizer step.
    """

    largest: float
    log_prob: float
    before: float
    tokens: int


def log_prob_limit(before: float, tokens: int) -> float:
    """The mean log-prob of a step's own tokens below which the step has ruined the weights, in nats:

        before - 1 - 50 / n

    The policy p before the step sampled the n tokens y, or one a few steps older did. So the mean of
    ln p(y) - ln q(y) estimates the divergence KL(p || q) of the new policy q. A clipped update moves few
    ratios q / p beyond 1 - `clip_low`, by 0.2 nats, and usual steps have a divergence of 0.001 to 0.05. One
    nat for each token, a mean ratio of 0.37, is more than any sound update does, also with many mini-batches.
    The second term is for few tokens, of which one may fall far: 0.1 nats for the 512 that are measured.

    The limit is relative. Ruined weights often do not give arbitrary log-probs but exactly those of a uniform
    guess, -ln of the vocabulary: where activations overflow, a norm divides them to 0. A model with random
    weights is near that before it learns anything.

    So the check finds ruin, not a policy that learns the wrong thing.
    """
    return before - MARGIN - CHANCE / max(tokens, 1)


def ruin(check: WeightCheck) -> str | None:
    """What shows that the weights are ruined; None if nothing does."""
    if not math.isfinite(check.largest):
        return "a weight is not finite"
    limit = log_prob_limit(check.before, check.tokens)
    if check.log_prob >= limit:
        return None
    return (
        f"{check.tokens} tokens that it trained had a mean log-prob of {check.before:.4g} before, and have "
        f"{check.log_prob:.4g} now (no sound step falls below {limit:.4g}); the largest weight is "
        f"{check.largest:.3g}"
    )
