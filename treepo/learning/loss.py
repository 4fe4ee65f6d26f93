"""The policy loss of one micro-batch, on tokens that several trajectories may share.

A token shared by the leaves S has one probability ratio r, and the clipped, dual-clipped loss is
positively homogeneous in the advantage for each of its signs, so

    sum over k in S of L(r, A_k)  =  L(r, A+) + L(r, A-),   A+ = sum of max(A_k, 0), A- = sum of min(A_k, 0).

A packed token therefore carries (A+, A-) and the summed weights (K+, K-) of the leaves behind each, and
training it once is exact. KL and entropy terms count K+ + K- times. Every micro-batch's loss is divided by
the whole mini-batch's `denominator`: micro-batches and data-parallel ranks only add up.

Beyond the paper: the importance weight between engine and trainer (on unless `importance_cap` is null), KL,
entropy, and a token mean over the whole mini-batch where the official code takes it per micro-batch.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from treepo.config.learning import LearningConfig
from treepo.learning.packing import Pack


def denominator(packs: Iterable[Iterable[Pack]], config: LearningConfig) -> float:
    """What the summed token losses of one mini-batch are divided by; `packs`: those of all replicas.

    Token mean: the tokens of all trajectories. Sequence mean: the trajectories (a token's weight is one
    over its trajectory's length then). Constant: trajectories x `normalisation_tokens`. Leaf weights count
    throughout. 0 where the mini-batch trains nothing: there is no step to take then.
    """
    every = [pack for replica in packs for pack in replica]
    if config.normalisation_tokens is not None:
        return config.normalisation_tokens * sum(pack.leaf_weight for pack in every)
    return sum(float(pack.count_pos.sum() + pack.count_neg.sum()) for pack in every)


def policy_loss(
    log_prob: Tensor,
    pack: Mapping[str, Tensor],
    config: LearningConfig,
    denominator: float,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of its mini-batch's loss (a scalar), and its metrics.

    log_prob: [T], of each token under the current policy (anything finite where a token is not trained).
    pack: fields of `treepo.learning.packing.Pack` as tensors [T] on the same device. Without `old_log_prob` the
        current policy is the old one; ValueError where `mini_batches` makes that untrue.
    entropy: [T], of the distribution that predicts each token; ValueError where the bonus needs it.

    A metric's key ends in `_sum`, `_max` or `_min`: how it is reduced over micro-batches and ranks, before
    `summarise`. Sums are float64 and weighted as the loss is.
    """
    count = (pack["count_pos"] + pack["count_neg"]).to(log_prob.dtype)
    trained = count > 0
    old_log_prob = _old_log_prob(log_prob, pack, config)
    importance = torch.where(trained, old_log_prob - pack["rollout_log_prob"], 0.0).exp()
    total, metrics = _surrogate(torch.where(trained, log_prob - old_log_prob, 0.0), pack, config)
    metrics |= {
        "weight_sum": _sum(count),
        "unique_tokens_sum": _sum(trained),
        "importance_sum": _sum(count * importance),
        "importance_max": importance.where(trained, -math.inf).max(),
        "importance_min": importance.where(trained, math.inf).min(),
    }
    if config.importance_cap is not None:
        metrics["importance_capped_sum"] = _sum(count * (importance > config.importance_cap))
        total = total * importance.clamp(max=config.importance_cap)
    if config.kl_coefficient:
        if "reference_log_prob" not in pack:
            raise ValueError(
                f"kl_coefficient = {config.kl_coefficient} needs reference_log_prob in each pack"
            )
        log_ratio = torch.where(trained, log_prob - pack["reference_log_prob"], 0.0)
        kl = count * KL_ESTIMATORS[config.kl_estimator](log_ratio)
        metrics["reference_kl_sum"] = _sum(kl)
        total = total + config.kl_coefficient * kl
    if entropy is not None:
        weighted = count * torch.where(trained, entropy, 0.0)
        metrics["entropy_sum"] = _sum(weighted)
        total = total - config.entropy_coefficient * weighted
    elif config.entropy_coefficient:
        raise ValueError(f"entropy_coefficient = {config.entropy_coefficient} needs the tokens' entropy")
    loss = total.sum() / denominator
    return loss, {"loss_sum": _sum(loss), **metrics}


def summarise(reduced: Mapping[str, float]) -> dict[str, float]:
    """The mini-batch's metrics, from those of `policy_loss` reduced over micro-batches and ranks.

    `loss` is the sum, `unique_tokens` counts packed tokens that were trained, `*_max` and `*_min` are
    extremes; every other name is a mean over the trained tokens of all trajectories (`clip_high`,
    `clip_low`, `dual_clip`, `importance_capped`: fractions).
    """
    summary = {"loss": reduced["loss_sum"], "unique_tokens": reduced["unique_tokens_sum"]}
    for key, value in reduced.items():
        name = key.removesuffix("_sum")
        if name == key:
            summary[key] = value
        elif name not in ("weight", "loss", "unique_tokens"):
            summary[name] = value / reduced["weight_sum"]
    return summary


KL_ESTIMATORS = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),
    "k3": lambda log_ratio: torch.expm1(-log_ratio) + log_ratio,
}
"""Estimates of KL(policy || other) from log(policy / other) of a token that the policy sampled: Schulman,
"Approximating KL divergence" (2020). As a loss, k1 has no gradient on average, k2 the right one on-policy.
"""


def _surrogate(
    log_ratio: Tensor, pack: Mapping[str, Tensor], config: LearningConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each token's clipped, dual-clipped loss [T] from log(policy / old policy) [T], 0 where not trained.

    Bounds are applied to the logarithm: the same loss and gradient, and no ratio can overflow.
    """
    advantage_pos, advantage_neg, count_pos, count_neg = (
        pack[key].to(log_ratio.dtype) for key in ("advantage_pos", "advantage_neg", "count_pos", "count_neg")
    )
    low, high = math.log1p(-config.clip_low), math.log1p(config.clip_high)
    dual = math.log(config.dual_clip)
    gain = advantage_pos * log_ratio.clamp(max=high).exp() + advantage_neg * log_ratio.clamp(low, dual).exp()
    trained = count_pos + count_neg > 0
    value = log_ratio.detach()
    return -gain, {
        "clip_high_sum": _sum(count_pos * (value > high)),
        "clip_low_sum": _sum(count_neg * (value < low)),
        "dual_clip_sum": _sum(count_neg * (value > dual)),
        # Of the old policy's samples, hence estimated the other way round.
        "old_kl_sum": _sum((count_pos + count_neg) * KL_ESTIMATORS["k3"](-value)),
        "ratio_max": value.where(trained, -math.inf).max().exp(),
        "ratio_min": value.where(trained, math.inf).min().exp(),
    }


def _old_log_prob(log_prob: Tensor, pack: Mapping[str, Tensor], config: LearningConfig) -> Tensor:
    if "old_log_prob" in pack:
        return pack["old_log_prob"].to(log_prob.dtype)
    if config.mini_batches > 1:
        raise ValueError(f"mini_batches = {config.mini_batches} needs old_log_prob in each pack")
    return log_prob.detach()


def _sum(values: Tensor) -> Tensor:
    return values.detach().sum(dtype=torch.float64)
