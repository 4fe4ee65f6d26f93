# ruff: noqa: N802, N815 - the suffix names the dimension (CONTRIBUTING.md)
"""Advantage estimators on trees: from the rewards of a batch's leaves to one number a segment of each leaf.

R_i is the reward of leaf i; a group is the leaves below one node (the prompt's group: all of the tree's).
An estimator is one registered function that sees the whole batch and gives either one advantage a leaf (the
same on all its tokens) or one a segment on each leaf's path. Leaves that could not be graded are in no
group, no statistic and no loss.

Where this departs from the paper and its code: groups are nodes of the tree and never windows of 512
tokens, so a cut inside a segment is its own node; no depth is left out; `spo` scores a child against its
siblings (the official code's numbers are wrong). Kept from it: the only leaf of a prompt has no baseline,
its reward is its advantage. Beyond both, for `treepo`: `depth_count: constant`, with which a shared token's
net weight is exactly the node's value over its ancestors', and `distinct_groups`; for all: `leaf_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from treepo.learning.forest import Forest
from treepo.tree import Tree

if TYPE_CHECKING:  # the configuration checks itself against the registry below
    from treepo.config.learning import LearningConfig

WHITEN_EPSILON = 1e-8  # added to the variance
GRPO_EPSILON = 1e-6  # added to the standard deviation
SPO_EPSILON = 1e-8  # added to the standard deviation


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """What the loss needs of a batch of trees; leaves in the order of the trees and of their `leaves`.

    first_leaf_P: int64 [P + 1]; the leaves of tree p are first_leaf_P[p] to first_leaf_P[p + 1].
    offset_L: int64 [L + 1]; leaf l has value_M[offset_L[l] : offset_L[l + 1]].
    value_M: float64, one advantage a segment on the leaf's path, the prompt's child first.
    leaf_weight_L: float64, the leaf's weight among trajectories; 0 where it is not graded.
    token_weight_L: float64, the weight in the loss of each of the leaf's tokens (its leaf weight, divided by
        the response's tokens under `normalisation: sequence_mean`).
    """

    first_leaf_P: np.ndarray
    offset_L: np.ndarray
    value_M: np.ndarray
    leaf_weight_L: np.ndarray
    token_weight_L: np.ndarray

    def of_trees(self, start: int, stop: int) -> Advantages:
        """Those of the trees `start` to `stop` of the batch."""
        first, last = self.first_leaf_P[start], self.first_leaf_P[stop]
        offset_L = self.offset_L[first : last + 1]
        return Advantages(
            first_leaf_P=self.first_leaf_P[start : stop + 1] - first,
            offset_L=offset_L - offset_L[0],
            value_M=self.value_M[offset_L[0] : offset_L[-1]],
            leaf_weight_L=self.leaf_weight_L[first:last],
            token_weight_L=self.token_weight_L[first:last],
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """What an estimator sees. weight_L: each leaf's weight in group means; 0 where it is not graded."""

    forest: Forest
    weight_L: np.ndarray

    @cached_property
    def size_N(self) -> np.ndarray:
        """Graded leaves below each node."""
        return self.forest.sum_leaves(np.ones(len(self.weight_L)))

    @cached_property
    def weight_N(self) -> np.ndarray:
        """Their weight."""
        return self.forest.sum_leaves(self.weight_L)

    @cached_property
    def value_N(self) -> np.ndarray:
        """Their weighted mean reward; 0 where there are none."""
        return _divide(self.forest.sum_leaves(self.weight_L * self.forest.reward_L), self.weight_N)

    @cached_property
    def prompt_L(self) -> np.ndarray:
        """The node of each leaf's prompt."""
        return self.forest.first_P[self.forest.tree_L]

    @cached_property
    def alone_N(self) -> np.ndarray:
        """bool: whether a node is the prompt of one graded leaf, which is compared with nothing."""
        return (self.forest.depth_N == 0) & (self.size_N == 1)

    @cached_property
    def centred_L(self) -> np.ndarray:
        """Each leaf's reward minus its prompt's mean, the reward itself where it is alone."""
        return self.forest.reward_L - np.where(self.alone_N, 0.0, self.value_N)[self.prompt_L]


Estimate = Callable[[Batch, "LearningConfig"], np.ndarray]


@dataclass(frozen=True, slots=True)
class Estimator:
    """per: whether `function` returns one value a leaf ([L]) or a segment on each path ([M]).
    whiten: to mean 0 and variance 1 over all trained tokens of the batch afterwards.
    reads: the options of `LearningConfig` that this estimator reads and not every one does.
    """

    function: Estimate
    per: Literal["leaf", "segment"]
    whiten: bool
    reads: tuple[str, ...]


ESTIMATORS: dict[str, Estimator] = {}


def register(
    *, per: Literal["leaf", "segment"], whiten: bool, reads: tuple[str, ...] = ()
) -> Callable[[Estimate], Estimate]:
    """Make the decorated function available as `learning.estimator`, under its own name."""

    def add(function: Estimate) -> Estimate:
        ESTIMATORS[function.__name__] = Estimator(function, per, whiten, reads)
        return function

    return add


def estimate(trees: Sequence[Tree], config: LearningConfig) -> Advantages:
    """Advantages of a whole batch: whitening spans all of `trees`."""
    estimator = ESTIMATORS[config.estimator]
    forest = Forest.of(trees)
    weight_L = forest.graded_L.astype(np.float64)
    if config.leaf_weights == "inverse_branching":
        weight_L = inverse_branching(forest)
    value = estimator.function(Batch(forest, weight_L), config)
    value_M = value[forest.path_leaf_M] if estimator.per == "leaf" else value
    token_M = weight_L[forest.path_leaf_M] * forest.length_N[forest.path_node_M]
    value_M = np.where(token_M > 0, value_M, 0.0)
    if estimator.whiten:
        value_M = whiten(value_M, token_M)
    per_token = forest.response_tokens_L if config.normalisation == "sequence_mean" else 1.0
    return Advantages(
        first_leaf_P=np.searchsorted(forest.tree_L, np.arange(len(trees) + 1)),
        offset_L=forest.path_offset_L,
        value_M=value_M,
        leaf_weight_L=weight_L,
        token_weight_L=weight_L / per_token,
    )


def whiten(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(values - mean) / sqrt(variance + epsilon), the variance unbiased; values of weight 0 become 0."""
    total = weights.sum()
    if total == 0:
        return values
    centred = values - (weights * values).sum() / total
    variance = (weights * centred**2).sum() / max(total - 1, 1)
    return np.where(weights > 0, centred / np.sqrt(variance + WHITEN_EPSILON), 0.0)


def inverse_branching(forest: Forest) -> np.ndarray:
    """For each leaf the product of 1 / children along its path, scaled to the mean 1 in each tree: [L].

    The budget that a finished path leaves goes to the live ones, so long paths have more leaves than their
    share; under this weight a tree's mean is the policy's again. Only children with a graded leaf below
    count. Children that a fallback added share the weight of the path that it cut, which is not exactly
    unbiased: whether a path is cut depends on how it ended.
    """
    alive_N = forest.sum_leaves(np.ones(len(forest.leaf_node_L))) > 0
    segment_N = forest.depth_N > 0
    children_N = np.bincount(forest.parent_N[segment_N & alive_N], minlength=len(alive_N))
    share_N = np.where(segment_N, 1.0 / np.maximum(children_N, 1)[forest.parent_N], 1.0)
    share_L = np.exp(forest.levels.down(np.log(share_N)))[forest.leaf_node_L] * forest.graded_L
    mean_P = _divide(np.bincount(forest.tree_L, share_L), np.bincount(forest.tree_L, forest.graded_L))
    return _divide(share_L, mean_P[forest.tree_L])


@register(
    per="leaf",
    whiten=True,
    reads=("weighting", "include_root", "drop_zero_std", "depth_count", "distinct_groups"),
)
def treepo(batch: Batch, config: LearningConfig) -> np.ndarray:
    """Mean over the groups on a leaf's path of (R_i - the group's mean); groups of one leaf below the prompt
    are skipped. TreePO, equations 5 (`weighting: mean`) and 6 (`size`).
    """
    forest, size_N = batch.forest, batch.size_N
    root_N = forest.depth_N == 0
    counted_N = np.where(root_N, config.include_root, size_N > 1)
    if config.drop_zero_std:
        least_N = forest.sum_leaves(forest.reward_L, np.minimum, np.inf)
        most_N = forest.sum_leaves(forest.reward_L, np.maximum, -np.inf)
        counted_N &= (least_N < most_N) | batch.alone_N
    if config.distinct_groups:
        counted_N &= root_N | (size_N != size_N[forest.parent_N])
    share_N = counted_N * (size_N if config.weighting == "size" else 1.0)
    total_L = forest.levels.down(share_N)[forest.leaf_node_L]
    value_N = np.where(batch.alone_N, 0.0, batch.value_N)
    baseline_L = forest.levels.down(share_N * value_N)[forest.leaf_node_L]
    divisor_L = total_L
    if config.depth_count == "constant":
        most_P = np.zeros(len(forest.first_P) - 1)
        np.maximum.at(most_P, forest.tree_L, total_L)
        divisor_L = most_P[forest.tree_L]
    return _divide(total_L * forest.reward_L - baseline_L, divisor_L)


@register(per="segment", whiten=True, reads=("eta",))
def treepo_segment(batch: Batch, config: LearningConfig) -> np.ndarray:
    """Progress: a segment's value minus eta^k times its parent's, k segments above the leaf on its path.

    A leaf's value is its size-weighted advantage over every group on its path, its own included; a node's
    is the mean of its children's; the prompt's counts as 0.
    """
    forest, size_N = batch.forest, batch.size_N
    baseline_L = forest.levels.down(size_N * batch.value_N)[forest.leaf_node_L]
    total_L = forest.levels.down(size_N)[forest.leaf_node_L]
    score_L = forest.reward_L - _divide(baseline_L, total_L)
    share_L = inverse_branching(forest)
    value_N = _divide(forest.sum_leaves(share_L * score_L), forest.sum_leaves(share_L))
    value_N[forest.depth_N == 0] = 0.0
    node_M, leaf_M = forest.path_node_M, forest.path_leaf_M
    above_leaf_M = forest.depth_N[forest.leaf_node_L][leaf_M] - forest.depth_N[node_M] + 1
    discount_M = 1.0 if config.eta is None else config.eta**above_leaf_M
    return value_N[node_M] - discount_M * value_N[forest.parent_N[node_M]]


@register(per="segment", whiten=False)
def spo(batch: Batch, config: LearningConfig) -> np.ndarray:  # noqa: ARG001 - reads no option
    """A segment's mean reward against its siblings', divided by their standard deviation; 0 without any."""
    forest = batch.forest
    sibling_N = (forest.depth_N > 0) & (batch.size_N > 0)
    parent, value = forest.parent_N[sibling_N], batch.value_N[sibling_N]
    count_N = np.bincount(parent, minlength=len(sibling_N))
    mean_N = _divide(np.bincount(parent, value, len(sibling_N)), count_N)
    centred = value - mean_N[parent]
    std_N = np.sqrt(_divide(np.bincount(parent, centred**2, len(sibling_N)), count_N))
    advantage_N = np.zeros(len(sibling_N))
    advantage_N[sibling_N] = centred / (std_N[parent] + SPO_EPSILON)
    return advantage_N[forest.path_node_M]


@register(per="leaf", whiten=False)
def grpo(batch: Batch, config: LearningConfig) -> np.ndarray:  # noqa: ARG001 - reads no option
    """(R_i - the prompt's mean) / the prompt's unbiased standard deviation. DeepSeekMath, section 4.1."""
    forest = batch.forest
    squares_N = forest.sum_leaves(batch.weight_L * batch.centred_L**2)
    std_N = np.sqrt(squares_N / np.maximum(batch.weight_N - 1, 1))
    divisor_N = np.where(batch.alone_N, 1.0, std_N + GRPO_EPSILON)
    return batch.centred_L / divisor_N[batch.prompt_L]


@register(per="leaf", whiten=False)
def dr_grpo(batch: Batch, config: LearningConfig) -> np.ndarray:  # noqa: ARG001 - reads no option
    """R_i minus the prompt's mean; goes with `normalisation: constant`. Liu et al. 2025."""
    return batch.centred_L


@register(per="leaf", whiten=False)
def rloo(batch: Batch, config: LearningConfig) -> np.ndarray:  # noqa: ARG001 - reads no option
    """R_i minus the mean of the prompt's other leaves. Ahmadian et al. 2024."""
    total_L = batch.weight_N[batch.prompt_L]
    others_L = np.where(batch.alone_N[batch.prompt_L], total_L, total_L - batch.weight_L)
    return _divide(total_L, others_L) * batch.centred_L


@register(per="leaf", whiten=True)
def reinforce_pp(batch: Batch, config: LearningConfig) -> np.ndarray:  # noqa: ARG001 - reads no option
    """R_i, whitened over the batch. REINFORCE++, Hu 2025."""
    return batch.forest.reward_L


@register(per="leaf", whiten=True)
def reinforce_pp_baseline(batch: Batch, config: LearningConfig) -> np.ndarray:  # noqa: ARG001 - reads no option
    """R_i minus the prompt's mean, whitened over the batch. REINFORCE++-baseline."""
    return batch.centred_L


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(denominator)), where=denominator != 0)
