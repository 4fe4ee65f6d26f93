# ruff: noqa: N815 - the suffix names the dimension (CONTRIBUTING.md)
"""Divides trees at their fallback cuts, so that leaves are compared only with leaves of the same cut.

The first part of a tree has the leaves that no cut added, and each cut has a part with those that it added,
below a prompt of its own: an estimator sees the parts as trees. A part was sampled by the policy from the
place where it begins, whatever decided on the cut, so its baselines are those of that place. What lies above
a cut is not in its part: the leaf says nothing about it, because the cut was made after it was sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from treepo.learning.forest import Forest
from treepo.tree import PROMPT, Tree


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """forest: the parts as trees. leaf_L: of each leaf of a part, its number in the batch. step_M: of each
    step of its path, the number of the step in the batch. compared_M: bool, whether the step's part has
    several graded leaves, or is the first of its tree.
    """

    forest: Forest
    leaf_L: np.ndarray
    step_M: np.ndarray
    compared_M: np.ndarray

    @classmethod
    def of(cls, trees: Sequence[Tree], whole: Forest) -> "Parts":
        """whole: the forest of `trees`."""
        parts: list[Tree] = []
        leaves: list[int] = []
        firsts: list[bool] = []
        for tree, first_leaf in zip(trees, whole.first_leaf_P[:-1].tolist(), strict=True):
            for number, (part, numbers) in enumerate(_divided(tree)):
                parts.append(part)
                firsts.append(number == 0)
                leaves += [first_leaf + leaf for leaf in numbers]
        forest = Forest.of(parts)
        leaf_L = np.array(leaves, dtype=np.int64)
        begin_L = whole.path_offset_L[leaf_L + 1] - np.diff(forest.path_offset_L)
        step_M = np.arange(forest.path_offset_L[-1]) - forest.path_offset_L[:-1][forest.path_leaf_M]
        graded_P = np.bincount(forest.tree_L, forest.graded_L, minlength=len(parts))
        compared_P = np.array(firsts, dtype=bool) | (graded_P > 1)
        return cls(
            forest=forest,
            leaf_L=leaf_L,
            step_M=step_M + begin_L[forest.path_leaf_M],
            compared_M=compared_P[forest.tree_L][forest.path_leaf_M],
        )


def _divided(tree: Tree) -> list[tuple[Tree, list[int]]]:
    """The tree's parts, each with the numbers of its leaves in the tree; only parts that have leaves."""
    if not tree.cuts:
        return [(tree, list(range(len(tree.leaves))))]
    cut_of = {segment: number for number, cut in enumerate(tree.cuts, 1) for segment in cut.segments}
    part_S: list[int] = []
    for index, segment in enumerate(tree.segments):
        above = 0 if segment.parent == PROMPT else part_S[segment.parent]
        part_S.append(cut_of.get(index, above))
    parts: list[tuple[Tree, list[int]]] = []
    for part in range(len(tree.cuts) + 1):
        kept = [index for index, number in enumerate(part_S) if number == part]
        place = {index: number for number, index in enumerate(kept)}
        segments = tuple(
            replace(tree.segments[index], parent=place.get(tree.segments[index].parent, PROMPT))
            for index in kept
        )
        numbers = [number for number, leaf in enumerate(tree.leaves) if leaf.segment in place]
        leaves = tuple(
            replace(tree.leaves[number], segment=place[tree.leaves[number].segment]) for number in numbers
        )
        if numbers:
            parts.append((replace(tree, segments=segments, leaves=leaves, cuts=()), numbers))
    return parts
