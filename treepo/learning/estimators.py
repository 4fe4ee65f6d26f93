# ruff: noqa: N802 - the suffix names the dimension (CONTRIBUTING.md)
"""Advantage estimators: one registered function each, chosen by name in `learning.estimator`.

R_i is the reward of leaf i. Every node defines a group, the leaves below it; the prompt's group is the whole
tree. An estimator sees the batch and returns either one advantage a leaf, which all its tokens share, or one
for each segment on each leaf's path. Leaves that could not be graded are in no group and no statistic.

Departures from the paper and its code:

- A group is a node of the tree, never a window of 512 tokens: a fallback cut inside a segment makes a new
  node.
- Every depth counts.
- `spo` compares a child with its siblings; the official code's numbers are wrong. A node's value is the mean
  over its leaves, there over its children: `leaf_weights: inverse_branching`.
- `treepo` adds `distinct_groups` and `depth_count: constant`. Under the latter, a shared token's net weight
  is exactly its node's value minus its ancestors'.

As in the official code, a prompt's only leaf has no baseline: its reward is its advantage.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from treepo.learning.forest import Forest

GRPO_EPSILON = 1e-6  # added to the standard deviation
SPO_EPSILON = 1e-8  # added to the standard deviation


@dataclass(frozen=True, eq=False)
class Batch:
    """What an estimator sees. weight_L: each leaf's weight in group means; 0 if it is not graded."""

    forest: Forest
    weight_L: np.ndarray  # noqa: N815

    @cached_property
    def size_N(self) -> np.ndarray:
        """Graded leaves below each node."""
        return self.forest.sum_leaves(np.ones(len(self.weight_L)))

    @cached_property
    def weight_N(self) -> np.ndarray:
        """The weight of the graded leaves below each node."""
        return self.forest.sum_leaves(self.weight_L)

    @cached_property
    def value_N(self) -> np.ndarray:
        """The weighted mean reward of the graded leaves below each node; 0 without any."""
        return divide(self.forest.sum_leaves(self.weight_L * self.forest.reward_L), self.weight_N)

    @cached_property
    def prompt_L(self) -> np.ndarray:
        """The node of each leaf's prompt."""
        return self.forest.first_P[self.forest.tree_L]

    @cached_property
    def alone_N(self) -> np.ndarray:
        """bool: whether the node is a prompt with one graded leaf, which has nothing to be compared with."""
        return (self.forest.depth_N == 0) & (self.size_N == 1)

    @cached_property
    def centred_L(self) -> np.ndarray:
        """Each leaf's reward minus its prompt's mean; the reward itself for a prompt's only leaf."""
        return self.forest.reward_L - np.where(self.alone_N, 0.0, self.value_N)[self.prompt_L]


@dataclass(frozen=True, slots=True)
class Estimator:
    """per: whether `function` returns one value a leaf ([L]) or one a segment of each path ([M]).
    whiten: whether the result is whitened over all trained tokens of the batch.
    options: the keys of `learning` that `function` takes as keyword arguments.
    """

    function: Callable[..., np.ndarray]
    per: Literal["leaf", "segment"]
    whiten: bool
    options: tuple[str, ...]


ESTIMATORS: dict[str, Estimator] = {}


def register[**P](
    *, per: Literal["leaf", "segment"], whiten: bool
) -> Callable[[Callable[P, np.ndarray]], Callable[P, np.ndarray]]:
    """Make the decorated function a value of `learning.estimator`, under its own name.

    The function takes the Batch and, as keyword-only arguments, the keys of `learning` that it reads. A
    configuration that sets such a key for an estimator that does not read it is an error.
    """

    def add(function: Callable[P, np.ndarray]) -> Callable[P, np.ndarray]:
        parameters = inspect.signature(function).parameters.values()
        options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        ESTIMATORS[function.__name__] = Estimator(function, per, whiten, options)
        return function

    return add


@register(per="leaf", whiten=True)
def treepo(
    batch: Batch,
    *,
    weighting: str,
    include_root: bool,
    drop_zero_std: bool,
    depth_count: str,
    distinct_groups: bool,
) -> np.ndarray:
    """Average (R_i - the group's mean) over the groups on a leaf's path. Groups of one leaf are left out,
    except the prompt's. TreePO, equations 5 (`weighting: mean`) and 6 (`size`).
    """
    forest, size_N = batch.forest, batch.size_N
    root_N = forest.depth_N == 0
    counted_N = np.where(root_N, include_root, size_N > 1)
    if drop_zero_std:
        least_N = forest.sum_leaves(forest.reward_L, np.minimum, np.inf)
        most_N = forest.sum_leaves(forest.reward_L, np.maximum, -np.inf)
        counted_N &= (least_N < most_N) | batch.alone_N
    if distinct_groups:
        counted_N &= root_N | (size_N != size_N[forest.parent_N])
    share_N = counted_N * (size_N if weighting == "size" else 1.0)
    total_L = forest.levels.down(share_N)[forest.leaf_node_L]
    value_N = np.where(batch.alone_N, 0.0, batch.value_N)
    baseline_L = forest.levels.down(share_N * value_N)[forest.leaf_node_L]
    divisor_L = total_L
    if depth_count == "constant":
        most_P = np.zeros(len(forest.first_P) - 1)
        np.maximum.at(most_P, forest.tree_L, total_L)
        divisor_L = most_P[forest.tree_L]
    return divide(total_L * forest.reward_L - baseline_L, divisor_L)


@register(per="segment", whiten=True)
def treepo_segment(batch: Batch, *, eta: float | None) -> np.ndarray:
    """Progress: a segment's value minus eta^k times its parent's, k segments above the leaf.

    A leaf's value is its size-weighted advantage over every group on its path, its own included. A node's
    value is the mean of its children's, a child once for each of its draws; the prompt's counts as 0.
    """
    forest, size_N = batch.forest, batch.size_N
    baseline_L = forest.levels.down(size_N * batch.value_N)[forest.leaf_node_L]
    total_L = forest.levels.down(size_N)[forest.leaf_node_L]
    value_L = forest.reward_L - divide(baseline_L, total_L)
    share_L = inverse_branching(forest)
    value_N = divide(forest.sum_leaves(share_L * value_L), forest.sum_leaves(share_L))
    value_N[forest.depth_N == 0] = 0.0
    node_M, leaf_M = forest.path_node_M, forest.path_leaf_M
    above_leaf_M = forest.depth_N[forest.leaf_node_L][leaf_M] - forest.depth_N[node_M] + 1
    discount_M = 1.0 if eta is None else eta**above_leaf_M
    return value_N[node_M] - discount_M * value_N[forest.parent_N[node_M]]


@register(per="segment", whiten=False)
def spo(batch: Batch) -> np.ndarray:
    """A segment's mean reward minus its siblings' mean, over their deviation; 0 for an only child. A sibling
    counts once for each of its draws.
    """
    forest = batch.forest
    sibling_N = (forest.depth_N > 0) & (batch.size_N > 0)
    parent, value, draws = (each[sibling_N] for each in (forest.parent_N, batch.value_N, forest.draws_N))
    count_N = np.bincount(parent, draws, len(sibling_N))
    mean_N = divide(np.bincount(parent, draws * value, len(sibling_N)), count_N)
    centred = value - mean_N[parent]
    std_N = np.sqrt(divide(np.bincount(parent, draws * centred**2, len(sibling_N)), count_N))
    advantage_N = np.zeros(len(sibling_N))
    advantage_N[sibling_N] = centred / (std_N[parent] + SPO_EPSILON)
    return advantage_N[forest.path_node_M]


@register(per="leaf", whiten=False)
def grpo(batch: Batch) -> np.ndarray:
    """(R_i - the prompt's mean) / the prompt's unbiased standard deviation. DeepSeekMath, section 4.1."""
    forest = batch.forest
    squares_N = forest.sum_leaves(batch.weight_L * batch.centred_L**2)
    std_N = np.sqrt(squares_N / np.maximum(batch.weight_N - 1, 1))
    divisor_N = np.where(batch.alone_N, 1.0, std_N + GRPO_EPSILON)
    return batch.centred_L / divisor_N[batch.prompt_L]


@register(per="leaf", whiten=False)
def dr_grpo(batch: Batch) -> np.ndarray:
    """R_i minus the prompt's mean; meant for `normalisation: constant`. Liu et al. 2025."""
    return batch.centred_L


@register(per="leaf", whiten=False)
def rloo(batch: Batch) -> np.ndarray:
    """R_i minus the mean of the prompt's other leaves. Ahmadian et al. 2024."""
    total_L = batch.weight_N[batch.prompt_L]
    others_L = np.where(batch.alone_N[batch.prompt_L], total_L, total_L - batch.weight_L)
    return divide(total_L, others_L) * batch.centred_L


@register(per="leaf", whiten=True)
def reinforce_pp(batch: Batch) -> np.ndarray:
    """R_i, whitened over the batch. REINFORCE++, Hu 2025."""
    return batch.forest.reward_L


@register(per="leaf", whiten=True)
def reinforce_pp_baseline(batch: Batch) -> np.ndarray:
    """R_i minus the prompt's mean, whitened over the batch. REINFORCE++-baseline."""
    return batch.centred_L


def inverse_branching(forest: Forest) -> np.ndarray:
    """Weigh each leaf by the product of 1 / children along its path, scaled to mean 1 in each tree: [L].

    A child counts once for each of its draws: its factor is draws / (sum of its siblings' and its own).

    A finished path passes its budget on to the live ones, so long paths have more leaves than their share;
    under this weight a tree's mean reward is the policy's again. Only children with a graded leaf below them
    count. The children that a fallback adds share the weight of the path that it cut. A small bias remains,
    because the choice of that path depends on how it ended.
    """
    alive_N = forest.sum_leaves(np.ones(len(forest.leaf_node_L))) > 0
    segment_N = forest.depth_N > 0
    child_N = segment_N & alive_N
    draws_N = np.bincount(forest.parent_N[child_N], forest.draws_N[child_N], len(alive_N))
    share_N = np.where(segment_N, forest.draws_N / np.maximum(draws_N, 1)[forest.parent_N], 1.0)
    share_L = np.exp(forest.levels.down(np.log(share_N)))[forest.leaf_node_L] * forest.graded_L
    mean_P = divide(np.bincount(forest.tree_L, share_L), np.bincount(forest.tree_L, forest.graded_L))
    return divide(share_L, mean_P[forest.tree_L])


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient; 0 for a denominator of 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(denominator)), where=denominator != 0)
