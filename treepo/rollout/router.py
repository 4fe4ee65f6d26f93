"""Routes each tree to an engine and admits new trees while the engine's KV cache can hold them.

A prefix that a tree will extend must not be evicted. So the router estimates for each tree the most tokens
that its unfinished paths will hold at one time; finished paths may leave the cache. The estimate depends on
the number of leaves still to come: it is the average of what the last finished trees held from that point on.
A tree that turns out larger counts with what it holds. An engine without trees admits any tree, however
large.

Units: tokens of the KV cache. Arrays are indexed by the number of leaves to come, from 0 to width.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from treepo.config.sampling import SamplingConfig
from treepo.protocols import Sampler
from treepo.rewards.grade import Grade
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.path import PathRequest

REMEMBERED_TREES = 64


@dataclass(slots=True, eq=False)
class RoutedEngine:
    """An engine with the trees that live on it.

    kv_tokens: tokens in its KV cache; None: unbounded. leaves: still to come, summed over its trees.
    failures: failed requests since its last answer. expected_tokens: summed over its trees.
    """

    index: int
    engine: Sampler
    kv_tokens: int | None
    trees: "set[LiveTree]" = field(default_factory=set)
    leaves: int = 0
    failures: int = 0
    expected_tokens: int = 0

    @property
    def load(self) -> tuple[int, int]:
        """The router prefers the engine with the least load. Failures count first, because an engine that
        fails its requests soon has few leaves to come.
        """
        return self.failures, self.leaves


@dataclass(slots=True, eq=False)
class LiveTree:
    """A tree that has been admitted to an engine.

    home: the engine that it lives on. leaves: still to come. held: indexed by leaves to come, the most
    response tokens that its unfinished paths held at one time. expected_tokens: its share of the engine's KV
    cache. above: response tokens on its unfinished paths, updated when a path or round ends. grading: the
    paths that have ended and whose grades the tree does not have yet, if its policies read rewards.
    """

    tree: GrowingTree
    home: RoutedEngine
    leaves: int
    held: np.ndarray
    expected_tokens: int = 0
    above: int = 0
    grading: dict[PathRequest, asyncio.Task[Grade]] = field(default_factory=dict)


class Router:
    """Routes the trees of one driver. kv_tokens: tokens in each engine's KV cache; None: unbounded."""

    def __init__(
        self, engines: Sequence[Sampler], sampling: SamplingConfig, kv_tokens: Sequence[int] | None
    ) -> None:
        self.engines = [
            RoutedEngine(index, engine, tokens)
            for index, (engine, tokens) in enumerate(
                zip(engines, kv_tokens or [None] * len(engines), strict=True)
            )
        ]
        self._width = sampling.most_leaves
        self._max_live_trees = sampling.max_live_trees
        self._largest_tree = sampling.longest_response * sampling.most_leaves
        self._tokens = 0  # of all trees so far, a shared token once
        self._leaves = 0  # that have ended in them
        self._finished: deque[np.ndarray] = deque(maxlen=REMEMBERED_TREES)
        self._expected: list[int] = []  # tokens that a tree will hold, by its leaves to come
        self._expect(self._first_expectation())

    def engine_with_room(self, prompt_tokens: int) -> RoutedEngine | None:
        """The engine with the least load that has room for a new tree; None if all are full."""
        expected = self.expected_tree_tokens(prompt_tokens)
        return _least_loaded([engine for engine in self.engines if self._has_room(engine, expected)])

    def expected_tree_tokens(self, prompt_tokens: int) -> int:
        """Tokens that a new tree is expected to hold: the average of the most that earlier trees held."""
        return prompt_tokens + self._expected[self._width]

    def admit(self, tree: GrowingTree, engine: RoutedEngine) -> LiveTree:
        """Admit a new tree to `engine`."""
        live = LiveTree(tree, engine, self._width, np.zeros(self._width + 1, dtype=np.int64))
        self._add(live, engine)
        return live

    def remove(self, live: LiveTree) -> None:
        """Take a tree off its engine, finished or not."""
        live.home.trees.remove(live)
        live.home.leaves -= live.leaves
        live.home.expected_tokens -= live.expected_tokens

    def move(self, live: LiveTree) -> None:
        """Move a tree to the least loaded other engine, preferably one with room.

        The new engine computes the tree's prefixes again. A tree that must move does not wait for room;
        instead the engine admits no new tree until all of its trees have room. If there is no other engine,
        the tree stays.
        """
        others = [engine for engine in self.engines if engine is not live.home]
        with_room = [engine for engine in others if self._has_room(engine, live.expected_tokens)]
        if (engine := _least_loaded(with_room or others)) is not None:
            self.remove(live)
            self._add(live, engine)

    def count_tokens(self, tokens: int) -> None:
        """Count tokens by which any tree has grown."""
        self._tokens += tokens

    def leaf_ended(self, live: LiveTree) -> None:
        """Count the end of one of the tree's paths."""
        live.leaves -= 1
        live.home.leaves -= 1
        self._leaves += 1
        if not self._finished:
            self._expect(self._first_expectation())
        self._measure(live)

    def round_ended(self, live: LiveTree) -> None:
        """Measure a tree whose path requests are complete. Call it before the tree advances."""
        for leaves, tokens in live.tree.held():
            live.held[leaves] = max(live.held[leaves], tokens)
        self._measure(live)

    def tree_finished(self, live: LiveTree) -> None:
        """Learn from a complete tree, which has been removed: later trees are expected to be like it."""
        self._finished.append(np.maximum.accumulate(live.held))
        self._expect(np.mean(self._finished, axis=0))

    def _first_expectation(self) -> np.ndarray:
        """The estimate before any tree has finished: a leaf to come costs what a leaf has cost so far.

        The tokens of unfinished paths count too, and short paths end first, so the estimate starts too high
        and falls. Before any path has ended it is the most that a tree can hold.
        """
        tokens = self._largest_tree
        if self._leaves:
            tokens = min(tokens, self._tokens * self._width / self._leaves)
        return tokens * np.arange(self._width + 1) / self._width

    def _expect(self, expected: np.ndarray) -> None:
        self._expected = expected.astype(np.int64).tolist()
        for engine in self.engines:
            for live in engine.trees:
                self._update_expected_tokens(live)

    def _measure(self, live: LiveTree) -> None:
        live.above = live.tree.above()
        self._update_expected_tokens(live)

    def _update_expected_tokens(self, live: LiveTree) -> None:
        response = max(self._expected[live.leaves], live.above)
        expected = len(live.tree.prompt.tokens) + response
        live.home.expected_tokens += expected - live.expected_tokens
        live.expected_tokens = expected

    def _has_room(self, engine: RoutedEngine, expected: int) -> bool:
        if not engine.trees:
            return True
        if self._max_live_trees is not None:
            return len(engine.trees) < self._max_live_trees
        return engine.kv_tokens is None or engine.expected_tokens + expected <= engine.kv_tokens

    def _add(self, live: LiveTree, engine: RoutedEngine) -> None:
        live.home = engine
        engine.trees.add(live)
        engine.leaves += live.leaves
        engine.expected_tokens += live.expected_tokens
        self._update_expected_tokens(live)


def _least_loaded(engines: Sequence[RoutedEngine]) -> RoutedEngine | None:
    return min(engines, key=lambda engine: engine.load, default=None)
