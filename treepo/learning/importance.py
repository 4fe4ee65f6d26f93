"""The weight of a token's policy loss, which corrects for the weights and kernels that sampled the token.

The ratio is the trainer's probability before the step's first update over the engine's. Its level says which
tokens have one ratio (treepo.learning.ratio): each its own, or all tokens of a segment, or of a leaf's
response, as in geometric sequence masking (Liu et al., "When Speed Kills Stability", 2025).

`truncate` clamps the ratio to the bounds, as IMPALA (arXiv:1802.01561) does from above. `mask` makes a ratio
outside them 0, as IcePop does with tokens; masked tokens still count in the loss's denominator.

At the levels of tokens and segments a weight depends on the segment alone, so leaves that share a token agree
on it, and the token can be trained once. The level of leaves needs packs of whole trajectories.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from treepo.config.learning import ImportanceConfig
from treepo.learning.ratio import at_level


def importance_weights(
    old_log_prob: Tensor, pack: Mapping[str, Tensor], config: ImportanceConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weight of each of a micro-batch's tokens [T], and metrics.

    old_log_prob: [T], under the trainer's weights before the step's first update: a weight does not depend on
        the optimizer step that trains the token.
    pack: as in `policy_loss`; also `offset` for segments and `source` for leaves.

    A weight has no gradient. It is 1 for a token that is not trained, and NaN if a log-prob is. Metrics are
    reduced as those of `policy_loss`, count a token once for every leaf that shares it, and measure the ratio
    of the configured level; those of the bounds and weights are left out if the mode is `none`.
    """
    count = (pack["count_pos"] + pack["count_neg"]).to(old_log_prob.dtype)
    trained = count > 0
    log_ratio = torch.where(trained, old_log_prob.detach() - pack["rollout_log_prob"], 0.0)
    ratio = at_level(log_ratio, pack, trained, config.level).exp()
    metrics = {
        "importance_sum": _sum(count * ratio),
        "importance_max": ratio.where(trained, -math.inf).max(),
        "importance_min": ratio.where(trained, math.inf).min(),
    }
    if config.mode == "none":
        return torch.ones_like(ratio), metrics
    low, high = config.bounds
    below, above = ratio < low, ratio > high
    weight = ratio.clamp(low, high) if config.mode == "truncate" else ratio.masked_fill(below | above, 0.0)
    weighted = count.double() * weight.double()
    return weight, metrics | {
        "importance_below_sum": _sum(count * below),
        "importance_above_sum": _sum(count * above),
        "importance_weight_sum": _sum(weighted),
        "importance_square_sum": _sum(weighted * weight),
    }


def effective_sample_share(weight: float, square: float, count: float) -> float:
    """Compute the effective sample size over the number of samples, (sum w)^2 / (n sum w^2), from the sums of
    weights, of their squares, and of samples: 1 if all weights are equal, 0 if all of them are 0.
    """
    return weight**2 / (count * square) if square else 0.0


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)
