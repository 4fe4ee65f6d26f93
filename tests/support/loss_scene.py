"""A batch for tests of the loss: its packs, the loss as the trainer computes it, and leaf by leaf."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tests.support.small_trees import config_of, random_batch
from tests.support.tiny_policy import VOCABULARY, TinyPolicy
from treepo.config.learning import ImportanceConfig, LearningConfig
from treepo.learning.advantage import estimate
from treepo.learning.loss import denominator, policy_loss, summarise
from treepo.learning.packing import Pack
from treepo.learning.policy_losses import POLICY_LOSSES, Level
from treepo.tree import PROMPT, Tree


def tensors(pack: Pack) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column) for name, column in pack.columns().items()}


@dataclass(frozen=True)
class Response:
    """A leaf's response of T tokens. token: also those of the prompt. lengths: of its segments. weight: the
    leaf's. The other tensors are [T].
    """

    token: Tensor
    lengths: list[int]
    old: Tensor
    reference: Tensor
    rollout: Tensor
    advantage: Tensor
    weight: float


class Scene:
    """A batch with old and reference log-probs so far from the policy's that every bound is reached."""

    def __init__(self, seed: int, options: dict[str, object], trees: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.config = config_of(**options)
        self.policy = TinyPolicy(seed)
        batch = random_batch(
            rng, trees, ungraded=0.15, max_depth=4, max_tokens=4, least_leaves=3, vocabulary=VOCABULARY
        )
        shape = [[len(segment.tokens) for segment in tree.segments] for tree in batch]
        near = -math.log(VOCABULARY)
        self.old = [[(near + 2 * rng.normal(size=n)).astype(np.float32) for n in row] for row in shape]
        self.reference = [[(near + rng.normal(size=n)).astype(np.float32) for n in row] for row in shape]
        self.trees = [sampled_near(old, tree, rng) for tree, old in zip(batch, self.old, strict=True)]
        self.advantages = estimate(self.trees, self.config)

    def packs(self, packer: Callable[..., list[list[Pack]]], budget: int, replicas: int) -> list[list[Pack]]:
        packs = packer(self.trees, self.advantages, budget, replicas)
        return [[self.with_log_probs(pack) for pack in replica] for replica in packs]

    def with_log_probs(self, pack: Pack) -> Pack:
        places = list(zip(pack.tree.tolist(), pack.segment.tolist(), pack.offset.tolist(), strict=True))

        def column(table: list[list[np.ndarray]]) -> np.ndarray:
            values = [0.0 if segment == PROMPT else table[tree][segment][at] for tree, segment, at in places]
            return np.array(values, dtype=np.float32)

        return replace(pack, old_log_prob=column(self.old), reference_log_prob=column(self.reference))

    def loss(self, packs: Sequence[Sequence[Pack]]) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss as the trainer does: each micro-batch of each replica alone, then the sum."""
        divisor = denominator(packs, self.config)
        losses, metrics = [], []
        for pack in chain.from_iterable(packs):
            fields_T = tensors(pack)
            token, position, exits, source = (
                fields_T[name].long() for name in ("token", "position", "exit", "source")
            )
            log_prob, entropy = self.policy.log_probs_and_entropy(token, position, exits, source)
            loss, values = policy_loss(log_prob, fields_T, self.config, divisor, entropy)
            losses.append(loss)
            metrics.append({key: float(value) for key, value in values.items()})
        reduce = {"sum": math.fsum, "max": max, "min": min}
        reduced = {
            key: reduce[key.rsplit("_", 1)[1]](values[key] for values in metrics) for key in metrics[0]
        }
        return torch.stack(losses).sum(), summarise(reduced)

    def naive_loss(self) -> Tensor:
        """Compute the loss leaf by leaf and token by token, from the trees alone."""
        total, divisor, config = torch.zeros((), dtype=torch.float64), 0.0, self.config
        for response in self.responses():
            length, place = len(response.old), torch.arange(len(response.token))
            log_prob, entropy = self.policy.log_probs_and_entropy(
                response.token, place, torch.full_like(place, len(place)), place - 1
            )
            losses = naive_token_losses(config, log_prob[-length:], entropy[-length:], response)
            mean = config.normalisation == "sequence_mean"
            total = total + response.weight * losses.sum() / (length if mean else 1)
            counts = {
                "token_mean": length,
                "sequence_mean": 1,
                "constant": config.normalisation_tokens or 0,
            }
            divisor += response.weight * counts[config.normalisation]
        return total / divisor

    def responses(self) -> Iterator[Response]:
        """Yield the responses of all graded leaves."""
        leaves = ((number, leaf) for number, tree in enumerate(self.trees) for leaf in tree.leaves)
        for index, (number, leaf) in enumerate(leaves):
            tree = self.trees[number]
            if leaf.reward is None:
                continue
            path = tree.path(leaf.segment)
            steps = slice(*self.advantages.forest.path_offset_L[index : index + 2])
            lengths = [len(tree.segments[node].tokens) for node in path]
            yield Response(
                token=torch.from_numpy(np.concatenate([tree.prompt, tree.response(leaf)])).long(),
                lengths=lengths,
                old=along(path, self.old[number]),
                reference=along(path, self.reference[number]),
                rollout=along(path, [segment.log_probs for segment in tree.segments]),
                advantage=torch.from_numpy(np.repeat(self.advantages.value_M[steps], lengths)),
                weight=float(self.advantages.leaf_weight_L[index]),
            )


def along(path: Sequence[int], arrays: Sequence[np.ndarray]) -> Tensor:
    """The path's segments' arrays one after another, in float64."""
    return torch.from_numpy(np.concatenate([arrays[node] for node in path])).double()


def sampled_near(old: Sequence[np.ndarray], tree: Tree, rng: np.random.Generator) -> Tree:
    """The tree with log-probs of the engine so far from `old` that every level of ratios has outliers."""
    engine = [
        (log_prob + rng.normal() + rng.normal(size=len(log_prob))).astype(np.float32) for log_prob in old
    ]
    segments = (replace(segment, log_probs=it) for segment, it in zip(tree.segments, engine, strict=True))
    return replace(tree, segments=tuple(segments))


def naive_token_losses(
    config: LearningConfig, log_prob: Tensor, entropy: Tensor, response: Response
) -> Tensor:
    """The loss of each of a leaf's tokens: the policy term as it is printed in papers, KL and entropy."""
    ratio = (log_prob - response.old).exp()
    level = POLICY_LOSSES[config.loss].level
    if level != "token":  # the value of the level's ratio, the gradient of the token's own (GSPO-token)
        ratio = geometric_means(ratio.detach(), response, level) * ratio / ratio.detach()
    term = {"cispo": naive_cispo, "sapo": naive_sapo}.get(config.loss, naive_ppo)
    loss = term(ratio, response.advantage, **config.loss_options)
    importance = geometric_means((response.old - response.rollout).exp(), response, config.importance.level)
    loss = loss * naive_weights(config.importance, importance)
    difference = log_prob - response.reference
    kl = {"k1": difference, "k2": difference**2 / 2, "k3": (-difference).exp() - 1 + difference}
    return loss + config.kl_coefficient * kl[config.kl_estimator] - config.entropy_coefficient * entropy


def naive_ppo(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> Tensor:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)


def naive_cispo(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantage * ratio.log()


def naive_sapo(ratio: Tensor, advantage: Tensor, gate_pos: float, gate_neg: float) -> Tensor:
    gate = torch.where(advantage > 0, torch.full_like(advantage, gate_pos), gate_neg)
    return -4 / gate / (1 + (-gate * (ratio - 1)).exp()) * advantage


def geometric_means(ratio: Tensor, response: Response, level: Level) -> Tensor:
    """Give each token the geometric mean of the ratios of its level: [T]."""
    lengths, total = response.lengths, sum(response.lengths)
    parts = ratio.split({"token": [1] * total, "segment": lengths, "leaf": [total]}[level])
    return torch.cat([part.prod().pow(1 / len(part)).expand(len(part)) for part in parts])


def naive_weights(config: ImportanceConfig, ratio: Tensor) -> Tensor:
    if config.mode == "none":
        return torch.ones_like(ratio)
    if config.mode == "truncate":
        return ratio.clamp(config.low or 0, config.high)
    kept = (ratio >= (config.low or 1 / config.high)) & (ratio <= config.high)
    return torch.where(kept, ratio, 0.0)


def naive_importance_metrics(scene: Scene) -> dict[str, float]:
    """The metrics of importance weights, by numpy on all tokens of all responses."""
    config = scene.config.importance
    responses = list(scene.responses())
    ratios = [
        geometric_means((response.old - response.rollout).exp(), response, config.level)
        for response in responses
    ]
    mean = scene.config.normalisation == "sequence_mean"
    count = np.concatenate(
        [
            np.full(len(ratio), response.weight / (len(ratio) if mean else 1))
            for response, ratio in zip(responses, ratios, strict=True)
        ]
    )
    ratio = torch.cat(ratios)
    weight = naive_weights(config, ratio).numpy()
    ratio = ratio.numpy()
    metrics = {
        "importance": np.average(ratio, weights=count),
        "importance_min": ratio.min(),
        "importance_max": ratio.max(),
    }
    if config.mode != "none":
        low = config.low or (1 / config.high if config.mode == "mask" else 0)
        metrics |= {
            "importance_weight": np.average(weight, weights=count),
            "importance_below": np.average(ratio < low, weights=count),
            "importance_above": np.average(ratio > config.high, weights=count),
            "effective_sample_share": (count @ weight) ** 2 / (count.sum() * (count @ weight**2)),
        }
    return {key: float(value) for key, value in metrics.items()}


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())
