# ruff: noqa: N802, N815 - the suffix names the dimension (CONTRIBUTING.md)
"""A batch of trees as flat arrays, so that numpy computes on the whole batch at once.

Nodes are numbered tree by tree: a tree's prompt, then its segments in order. Segment s of tree p is node
`first_P[p] + 1 + s`, and a parent's number is below its children's. Leaves are numbered tree by tree, in the
order of each tree's `leaves`. A leaf's path lists its segments from the prompt's child down.

Suffixes: `_P` one value a tree (its prompt), `_L` a leaf, `_N` a node, `_M` a step of a leaf's path (a
segment on it; all paths one after another).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from treepo.tree import Tree


class Levels:
    """Sums along the edges of a forest, one depth at a time.

    parent: int64 [N], -1 above a root. depth: int64 [N], 0 at a root, one more than the parent's elsewhere.
    """

    def __init__(self, parent: np.ndarray, depth: np.ndarray) -> None:
        self.parent = parent
        by_depth = np.argsort(depth, kind="stable")
        ends = np.cumsum(np.bincount(depth))
        self._below_roots = np.split(by_depth, ends[:-1])[1:] if len(depth) else []

    def up(self, values: np.ndarray, combine: np.ufunc = np.add) -> np.ndarray:
        """Combine each node's value with those of all nodes below it: [N]."""
        total = values.copy()
        for nodes in reversed(self._below_roots):
            combine.at(total, self.parent[nodes], total[nodes])
        return total

    def down(self, values: np.ndarray) -> np.ndarray:
        """Add to each node's value those of all nodes above it: [N]."""
        total = values.copy()
        for nodes in self._below_roots:
            total[nodes] += total[self.parent[nodes]]
        return total


@dataclass(frozen=True, eq=False)
class Forest:
    """The structure and the rewards of a batch of trees.

    first_P: int64 [P + 1], the node of each tree's prompt; the last entry is N.
    parent_N: int64, -1 for a prompt. depth_N: int64, segments on the path down to the node; 0 for a prompt.
    length_N: int64, tokens. tree_N: int64, the tree's number in the batch.
    draws_N: int64, a segment's draws; 1 for a prompt.
    leaf_node_L: int64. reward_L: float64, NaN for a leaf that is not graded.
    """

    first_P: np.ndarray
    parent_N: np.ndarray
    depth_N: np.ndarray
    length_N: np.ndarray
    draws_N: np.ndarray
    tree_N: np.ndarray
    leaf_node_L: np.ndarray
    reward_L: np.ndarray

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> "Forest":
        """Flatten `trees`."""
        parents: list[int] = []
        depths: list[int] = []
        lengths: list[int] = []
        draws: list[int] = []
        leaf_nodes: list[int] = []
        rewards: list[float] = []
        first = [0]
        for tree in trees:
            prompt = len(parents)
            parents.append(-1)
            depths.append(0)
            lengths.append(len(tree.prompt))
            draws.append(1)
            for segment in tree.segments:
                parent = prompt + 1 + segment.parent
                parents.append(parent)
                depths.append(depths[parent] + 1)
                lengths.append(len(segment.tokens))
                draws.append(segment.draws)
            for leaf in tree.leaves:
                leaf_nodes.append(prompt + 1 + leaf.segment)
                rewards.append(np.nan if leaf.reward is None else leaf.reward)
            first.append(len(parents))
        return cls(
            first_P=np.array(first, dtype=np.int64),
            parent_N=np.array(parents, dtype=np.int64),
            depth_N=np.array(depths, dtype=np.int64),
            length_N=np.array(lengths, dtype=np.int64),
            draws_N=np.array(draws, dtype=np.int64),
            tree_N=np.repeat(np.arange(len(trees)), np.diff(first)),
            leaf_node_L=np.array(leaf_nodes, dtype=np.int64),
            reward_L=np.array(rewards, dtype=np.float64),
        )

    def part(self, start: int, stop: int) -> "Forest":
        """The forest of the trees `start` to `stop`, numbered from 0; this one if that is all of them."""
        if (start, stop) == (0, len(self.first_P) - 1):
            return self
        nodes = slice(self.first_P[start], self.first_P[stop])
        leaves = slice(self.first_leaf_P[start], self.first_leaf_P[stop])
        return Forest(
            first_P=self.first_P[start : stop + 1] - nodes.start,
            parent_N=np.maximum(self.parent_N[nodes] - nodes.start, -1),
            depth_N=self.depth_N[nodes],
            length_N=self.length_N[nodes],
            draws_N=self.draws_N[nodes],
            tree_N=self.tree_N[nodes] - start,
            leaf_node_L=self.leaf_node_L[leaves] - nodes.start,
            reward_L=self.reward_L[leaves],
        )

    @cached_property
    def levels(self) -> Levels:
        return Levels(self.parent_N, self.depth_N)

    @cached_property
    def graded_L(self) -> np.ndarray:
        """bool: whether a leaf counts."""
        return ~np.isnan(self.reward_L)

    @cached_property
    def tree_L(self) -> np.ndarray:
        return self.tree_N[self.leaf_node_L]

    @cached_property
    def first_leaf_P(self) -> np.ndarray:
        """int64 [P + 1]: the leaves of tree p are `first_leaf_P[p]` to `first_leaf_P[p + 1]`."""
        return np.searchsorted(self.tree_L, np.arange(len(self.first_P)))

    @cached_property
    def path_offset_L(self) -> np.ndarray:
        """int64 [L + 1]: leaf l's path is `path_node_M[path_offset_L[l] : path_offset_L[l + 1]]`."""
        return np.concatenate([[0], np.cumsum(self.depth_N[self.leaf_node_L])])

    @cached_property
    def path_leaf_M(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.leaf_node_L)), np.diff(self.path_offset_L))

    @cached_property
    def path_node_M(self) -> np.ndarray:
        path_node_M = np.empty(self.path_offset_L[-1], dtype=np.int64)
        node, slot, left = self.leaf_node_L, self.path_offset_L[1:] - 1, self.depth_N[self.leaf_node_L]
        while len(node):
            path_node_M[slot] = node
            going_on = left > 1
            node, slot, left = self.parent_N[node[going_on]], slot[going_on] - 1, left[going_on] - 1
        return path_node_M

    @cached_property
    def path_tokens_N(self) -> np.ndarray:
        """int64: tokens on the node's path, from the prompt's first to the node's last."""
        return self.levels.down(self.length_N)

    @cached_property
    def response_tokens_L(self) -> np.ndarray:
        """int64: tokens of each leaf's response, the prompt excluded."""
        return self.path_tokens_N[self.leaf_node_L] - self.length_N[self.first_P[self.tree_L]]

    def sum_leaves(self, values_L: np.ndarray, combine: np.ufunc = np.add, empty: float = 0.0) -> np.ndarray:
        """Sum (or otherwise combine) each node's graded leaves: [N], `empty` for a node without any."""
        values_N = np.full(len(self.parent_N), empty)
        values_N[self.leaf_node_L[self.graded_L]] = values_L[self.graded_L]
        return self.levels.up(values_N, combine)
