"""The loss of one micro-batch whose tokens may be shared by several trajectories.

A token shared by the leaves S has one probability ratio r. For either sign of the advantage, a policy loss
(treepo.learning.policy_losses) is proportional to the advantage's size, so

    sum over k in S of L(r, A_k)  =  L(r, A+) + L(r, A-),   A+ = sum of max(A_k, 0), A- = sum of min(A_k, 0).

A packed token therefore carries (A+, A-) and the summed weights (K+, K-) of the leaves behind each, and
training it once is exact. KL and entropy terms count K+ + K- times. Every micro-batch's loss is divided by
the whole mini-batch's `denominator`, so micro-batches and data-parallel ranks simply add up.

Departures from the paper: an importance weight between engine and trainer (treepo.learning.importance), KL
and entropy terms, and a token mean over the whole mini-batch instead of each micro-batch.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from treepo.config.learning import LearningConfig
from treepo.learning.importance import effective_sample_share, importance_weights
from treepo.learning.kl import KL_ESTIMATORS, k3
from treepo.learning.packing import Pack
from treepo.learning.policy_losses import POLICY_LOSSES, Tokens
from treepo.learning.ratio import at_level


def denominator(packs: Iterable[Iterable[Pack]], config: LearningConfig) -> float:
    """Compute the number by which one mini-batch's summed token losses are divided; 0 if it trains nothing.

    packs: of each replica.

    Token mean: the tokens of all trajectories. Sequence mean: the trajectories (each token then weighs one
    over its trajectory's length). Constant: trajectories x `normalisation_tokens`. Leaf weights count in all
    three. If the result is 0, skip the optimizer step.
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
    step: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute one micro-batch's share of its mini-batch's loss (a scalar), and its metrics.

    log_prob: [T], of each token under the current policy; any finite value for an untrained token.
    pack: columns of a Pack (treepo.learning.packing) as tensors [T] on the same device. With one mini-batch,
        `old_log_prob` may be left out: the current policy is the old one.
    entropy: [T], of the distribution that predicts each token; needed for the entropy bonus.
    step: optimizer steps taken before this one, by which the entropy bonus decays.

    The end of a metric's key (`_sum`, `_max` or `_min`) says how it is reduced over micro-batches and ranks
    before `summarise`. Sums are float64 and weighted as the loss is. Raises ValueError if the configuration
    needs a column or the entropy and it is not given.
    """
    count = (pack["count_pos"] + pack["count_neg"]).to(log_prob.dtype)
    trained = count > 0
    old_log_prob = _old_log_prob(log_prob, pack, config)
    weight, measured = importance_weights(old_log_prob, pack, config.importance)
    total, metrics = _policy_term(torch.where(trained, log_prob - old_log_prob, 0.0), pack, config)
    total = total * weight
    metrics |= {"weight_sum": _sum(count), "unique_tokens_sum": _sum(trained)} | measured
    if config.kl_coefficient and config.kl_in == "loss":
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
        total = total - config.entropy_coefficient_at(step) * weighted
    elif config.entropy_coefficient:
        raise ValueError(f"entropy_coefficient = {config.entropy_coefficient} needs the tokens' entropy")
    loss = total.sum() / denominator
    return loss, {"loss_sum": _sum(loss), **metrics}


def summarise(reduced: Mapping[str, float]) -> dict[str, float]:
    """Turn the metrics of `policy_loss`, reduced over micro-batches and ranks, into the mini-batch's.

    `loss` is a sum, `unique_tokens` counts the packed tokens that were trained, `*_max` and `*_min` are
    extremes, and `effective_sample_share` is that of the importance weights. Every other metric is a mean
    over the trained tokens of all trajectories; `clip_high`, `clip_low`, `dual_clip`, `importance_above` and
    `importance_below` are fractions of them.
    """
    summary = {"loss": reduced["loss_sum"], "unique_tokens": reduced["unique_tokens_sum"]}
    for key, value in reduced.items():
        name = key.removesuffix("_sum")
        if name == key:
            summary[key] = value
        elif name not in ("weight", "loss", "unique_tokens", "importance_square"):
            summary[name] = value / reduced["weight_sum"]
    if "importance_square_sum" in reduced:
        summary["effective_sample_share"] = effective_sample_share(
            reduced["importance_weight_sum"], reduced["importance_square_sum"], reduced["weight_sum"]
        )
    return summary


def _policy_term(
    log_ratio: Tensor, pack: Mapping[str, Tensor], config: LearningConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each token's loss by `config.loss` [T], and its metrics.

    log_ratio: [T], log(policy / old policy), 0 for an untrained token.
    """
    loss = POLICY_LOSSES[config.loss]
    advantage_pos, advantage_neg, count_pos, count_neg = (
        pack[key].to(log_ratio.dtype) for key in ("advantage_pos", "advantage_neg", "count_pos", "count_neg")
    )
    count = count_pos + count_neg
    trained, own = count > 0, log_ratio.detach()
    of_level = at_level(own, pack, trained, loss.level)
    # The value is the level's, the gradient that of the token's own log-prob.
    tokens = Tokens(of_level + (log_ratio - own), advantage_pos, advantage_neg, count_pos, count_neg)
    losses, shares = loss.function(tokens, **config.loss_options)
    return losses, {f"{name}_sum": _sum(values) for name, values in shares.items()} | {
        # KL(old || policy): the old policy sampled the tokens.
        "old_kl_sum": _sum(count * k3(-own)),
        "ratio_max": of_level.where(trained, -math.inf).max().exp(),
        "ratio_min": of_level.where(trained, math.inf).min().exp(),
    }


def _old_log_prob(log_prob: Tensor, pack: Mapping[str, Tensor], config: LearningConfig) -> Tensor:
    if "old_log_prob" in pack:
        return pack["old_log_prob"].to(log_prob.dtype)
    if config.mini_batches > 1:
        raise ValueError(f"mini_batches = {config.mini_batches} needs old_log_prob in each pack")
    return log_prob.detach()


def _sum(values: Tensor) -> Tensor:
    return values.detach().sum(dtype=torch.float64)
