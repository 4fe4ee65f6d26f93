"""Straight-line versions of the advantage estimators: loops over leaves, with groups as lists."""

import math
from collections.abc import Callable
from statistics import stdev

import numpy as np

from treepo.config.learning import LearningConfig
from treepo.tree import PROMPT, Leaf, Tree


def graded(tree: Tree) -> list[Leaf]:
    return [leaf for leaf in tree.leaves if leaf.reward is not None]


def rewards_below(tree: Tree, node: int) -> list[float]:
    return [
        leaf.reward
        for leaf in tree.leaves
        if leaf.reward is not None and (node == PROMPT or node in tree.path(leaf.segment))
    ]


def children_of(tree: Tree, node: int) -> list[int]:
    return [
        index
        for index, segment in enumerate(tree.segments)
        if segment.parent == node and rewards_below(tree, index)
    ]


def drawn_children(tree: Tree, node: int) -> list[int]:
    """`children_of`, each as often as it was drawn."""
    return [child for child in children_of(tree, node) for _ in range(tree.segments[child].draws)]


def naive_treepo(tree: Tree, leaf: Leaf, config: LearningConfig) -> list[float]:
    def terms(leaf: Leaf) -> list[tuple[float, float]]:
        found, above = [], None
        for node in (PROMPT, *tree.path(leaf.segment)):
            group = rewards_below(tree, node)
            same_as_above = above is not None and len(group) == above
            above = len(group)
            if node == PROMPT and not config.include_root:
                continue
            if node != PROMPT and (len(group) == 1 or (config.distinct_groups and same_as_above)):
                continue
            alone = node == PROMPT and len(group) == 1
            if config.drop_zero_std and max(group) == min(group) and not alone:
                continue
            assert leaf.reward is not None
            weight = len(group) if config.weighting == "size" else 1
            found.append((weight, leaf.reward - (0.0 if alone else sum(group) / len(group))))
        return found

    mine = terms(leaf)
    divisor = sum(weight for weight, _ in mine)
    if config.depth_count == "constant":
        divisor = max(sum(weight for weight, _ in terms(other)) for other in graded(tree))
    advantage = sum(weight * delta for weight, delta in mine) / divisor if divisor else 0.0
    return [advantage] * len(tree.path(leaf.segment))


def naive_treepo_segment(tree: Tree, leaf: Leaf, config: LearningConfig) -> list[float]:
    def value(node: int) -> float:
        if node == PROMPT:
            return 0.0
        children = drawn_children(tree, node)
        if children:
            return sum(map(value, children)) / len(children)
        own = next(leaf for leaf in tree.leaves if leaf.segment == node)
        groups = [rewards_below(tree, above) for above in (PROMPT, *tree.path(node))]
        assert own.reward is not None
        deltas = [len(group) * (own.reward - sum(group) / len(group)) for group in groups]
        return sum(deltas) / sum(map(len, groups))

    path = tree.path(leaf.segment)
    eta = 1.0 if config.eta is None else config.eta
    return [
        value(node) - eta ** (len(path) - index) * value(parent)
        for index, (parent, node) in enumerate(zip((PROMPT, *path[:-1]), path, strict=True))
    ]


def naive_spo(tree: Tree, leaf: Leaf, _: LearningConfig) -> list[float]:
    def mean(node: int) -> float:
        return float(np.mean(rewards_below(tree, node)))

    advantages = []
    for node in tree.path(leaf.segment):
        siblings = [mean(child) for child in drawn_children(tree, tree.segments[node].parent)]
        advantages.append((mean(node) - np.mean(siblings)) / (np.std(siblings) + 1e-8))
    return advantages


def per_leaf(
    rule: Callable[[float, list[float]], float],
) -> Callable[[Tree, Leaf, LearningConfig], list[float]]:
    """Apply `rule` to a leaf's reward and its prompt's other rewards; an only leaf keeps its reward."""

    def naive(tree: Tree, leaf: Leaf, _: LearningConfig) -> list[float]:
        assert leaf.reward is not None
        others = [other.reward for other in graded(tree) if other is not leaf and other.reward is not None]
        return [rule(leaf.reward, others) if others else leaf.reward] * len(tree.path(leaf.segment))

    return naive


def naive_centred(reward: float, others: list[float]) -> float:
    return reward - (reward + sum(others)) / (len(others) + 1)


NAIVE = {
    "treepo": naive_treepo,
    "treepo_segment": naive_treepo_segment,
    "spo": naive_spo,
    "grpo": per_leaf(lambda r, others: naive_centred(r, others) / (stdev([r, *others]) + 1e-6)),
    "dr_grpo": per_leaf(naive_centred),
    "rloo": per_leaf(lambda r, others: r - sum(others) / len(others)),
    "reinforce_pp": per_leaf(lambda r, _: r),
    "reinforce_pp_baseline": per_leaf(naive_centred),
}
WHITENED = {"treepo", "treepo_segment", "reinforce_pp", "reinforce_pp_baseline"}


def naive_estimate(trees: list[Tree], config: LearningConfig) -> dict[tuple[int, int], list[float]]:
    """Map (tree, leaf) to one advantage a segment, whitened token by token if the estimator is."""
    values = {
        (number, index): NAIVE[config.estimator](tree, leaf, config)
        for number, tree in enumerate(trees)
        for index, leaf in enumerate(tree.leaves)
        if leaf.reward is not None
    }
    if config.estimator not in WHITENED:
        return values
    tokens = [
        value
        for (number, index), advantages in values.items()
        for value, node in zip(
            advantages, trees[number].path(trees[number].leaves[index].segment), strict=True
        )
        for _ in trees[number].segments[node].tokens
    ]
    mean, deviation = np.mean(tokens), math.sqrt(np.var(tokens, ddof=1) + 1e-8)
    return {key: [(value - mean) / deviation for value in advantages] for key, advantages in values.items()}
