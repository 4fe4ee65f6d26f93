"""Split trees into pieces that fit a pack.

A piece is a stretch of a tree's depth-first order, preceded by the path above its first segment as context.
So every ancestor of a segment in the piece is in the piece too. Suffixes as in treepo.learning.forest.
"""

from collections.abc import Iterator

import numpy as np

from treepo.learning.forest import Forest


def depth_first(forest: Forest) -> np.ndarray:
    """List the nodes above graded leaves tree by tree, each followed by everything below it."""
    graded_N = forest.sum_leaves(np.ones(len(forest.leaf_node_L))) > 0
    size_N = forest.levels.up(graded_N.astype(np.int64))
    by_parent = np.argsort(forest.parent_N, kind="stable")  # siblings side by side; prompts are siblings too
    before = np.concatenate([[0], np.cumsum(size_N[by_parent])[:-1]])
    parent = forest.parent_N[by_parent]
    eldest = np.flatnonzero(np.diff(parent, prepend=-2))
    elder_N = np.empty_like(size_N)
    elder_N[by_parent] = before - np.repeat(before[eldest], np.diff(eldest, append=len(parent)))
    rank_N = forest.levels.down(elder_N + (forest.depth_N > 0))
    order = np.empty(graded_N.sum(), dtype=np.int64)
    order[rank_N[graded_N]] = np.flatnonzero(graded_N)
    return order


def split_trees(forest: Forest, max_tokens: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the batch's pieces: the nodes of each in depth-first order, and how many of them are context.

    A tree of at most `max_tokens` tokens is one piece without context.
    """
    order = depth_first(forest)
    above_N = forest.path_tokens_N - forest.length_N
    ends = np.searchsorted(forest.tree_N[order], np.arange(len(forest.first_P)))
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        nodes = order[start:stop]
        if forest.length_N[nodes].sum() <= max_tokens:
            if len(nodes):
                yield nodes, 0
            continue
        for first, last in _best_split(forest.length_N[nodes], above_N[nodes], max_tokens):
            context, node = [], int(forest.parent_N[nodes[first]])
            while node >= 0:
                context.append(node)
                node = int(forest.parent_N[node])
            yield np.concatenate([np.array(context[::-1], dtype=np.int64), nodes[first:last]]), len(context)


def _best_split(length: np.ndarray, above: np.ndarray, max_tokens: int) -> list[tuple[int, int]]:
    """Split a tree's depth-first nodes so that the least context is repeated, then into the fewest pieces.

    length, above: tokens of each node, and of the path above it. A piece that starts at node i repeats
    above[i] tokens: every ancestor of its nodes is in the piece itself or above node i.
    """
    nodes = len(length)
    ends = np.cumsum(length)
    # One past the last node that fits a piece starting at each node.
    reach = np.searchsorted(ends, max_tokens - above + (ends - length), side="right")
    cost = np.zeros(nodes + 1, dtype=np.int64)
    after = np.zeros(nodes, dtype=np.int64)
    for node in range(nodes - 1, -1, -1):
        options = cost[node + 1 : reach[node] + 1]
        after[node] = node + 1 + options.argmin()
        cost[node] = above[node] + 1 + cost[after[node]]
    pieces, node = [], 0
    while node < nodes:
        pieces.append((node, int(after[node])))
        node = int(after[node])
    return pieces
