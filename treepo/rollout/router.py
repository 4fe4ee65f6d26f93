"""Routes each tree to an engine and admits new trees while the engine's KV cache can hold them.

A prefix that a tree will extend must not be evicted. So the router estimates for each tree the most tokens
that its unfinished paths will hold at one time; finished paths may leave the cache. The estimate depends on
the number of leaves still to come: it is the average of what the last finished trees held from that point on.
A tree that turns out larger counts with what it holds. An engine without trees admits any tree, however
large.

Units: tokens of the KV cache.
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
from treepo.rollout.occupancy import Occupancy
from treepo.rollout.path import PathRequest

REMEMBERED_TREES = 64


class RoutedEngine:
    """An engine with the trees that live on it; its numbers are in the router's `Occupancy`.

    kv_tokens: tokens in its KV cache; None: unbounded. leaves: still to come, summed over its trees.
    failures: failed requests since its last answer. expected_tokens: summed over its trees.
    """

    def __init__(self, index: int, engine: Sampler, kv_tokens: int | None, occupancy: Occupancy) -> None:
        self.index, self.engine, self.kv_tokens = index, engine, kv_tokens
        self.trees: set[LiveTree] = set()
        self._occupancy = occupancy

    @property
    def leaves(self) -> int:
        return int(self._occupancy.leaves[self.index])

    @property
    def expected_tokens(self) -> int:
        return int(self._occupancy.expected_tokens[self.index])

    @property
    def failures(self) -> int:
        return int(self._occupancy.failures[self.index])

    @failures.setter
    def failures(self, failures: int) -> None:
        self._occupancy.failures[self.index] = failures


@dataclass(slots=True, eq=False)
class LiveTree:
    """A tree that has been admitted to an engine.

    home: the engine that it lives on. place: its index in the router's `Occupancy`. leaves: still to come.
    held: indexed by leaves to come, the most response tokens that its unfinished paths held at one time.
    expected_tokens: its share of the engine's KV cache. grading: the paths that have ended and whose grades
    the tree does not have yet, if its policies read rewards.
    """

    tree: GrowingTree
    home: RoutedEngine
    place: int
    leaves: int
    held: np.ndarray
    occupancy: Occupancy = field(repr=False)
    grading: dict[PathRequest, asyncio.Task[Grade]] = field(default_factory=dict)

    @property
    def expected_tokens(self) -> int:
        return self.occupancy.tree_tokens(self.place)


class Router:
    """Routes the trees of one driver. kv_tokens: tokens in each engine's KV cache; None: unbounded."""

    def __init__(
        self, engines: Sequence[Sampler], sampling: SamplingConfig, kv_tokens: Sequence[int | None] | None
    ) -> None:
        of_engines = kv_tokens or [None] * len(engines)
        self._occupancy = Occupancy(of_engines, sampling.max_live_trees)
        self.engines = [
            RoutedEngine(index, engine, tokens, self._occupancy)
            for index, (engine, tokens) in enumerate(zip(engines, of_engines, strict=True))
        ]
        self._width = sampling.most_leaves
        self._largest_tree = sampling.longest_response * sampling.most_leaves
        self._tokens = 0  # of all trees so far, a shared token once
        self._leaves = 0  # that have ended in them
        self._finished: deque[np.ndarray] = deque(maxlen=REMEMBERED_TREES)
        self._occupancy.expect(self._first_expectation())

    def engine_with_room(self, prompt_tokens: int) -> RoutedEngine | None:
        """The engine with the least load that has room for a new tree; None if all are full."""
        room = self._occupancy.with_room(self.expected_tree_tokens(prompt_tokens))
        return self._least_loaded(room)

    def expected_tree_tokens(self, prompt_tokens: int) -> int:
        """Tokens that a new tree is expected to hold: the average of the most that earlier trees held."""
        return prompt_tokens + self._occupancy.expected_response(self._width)

    def admit(self, tree: GrowingTree, engine: RoutedEngine) -> LiveTree:
        """Admit a new tree to `engine`."""
        width = self._width
        place = self._occupancy.add(engine.index, width, len(tree.prompt.tokens))
        live = LiveTree(tree, engine, place, width, np.zeros(width + 1, dtype=np.int64), self._occupancy)
        engine.trees.add(live)
        return live

    def remove(self, live: LiveTree) -> None:
        """Take a tree off its engine, finished or not."""
        live.home.trees.remove(live)
        self._occupancy.remove(live.place)

    def move(self, live: LiveTree) -> None:
        """Move a tree to the least loaded other engine, preferably one with room.

        The new engine computes the tree's prefixes again. A tree that must move does not wait for room;
        instead the engine admits no new tree until all of its trees have room. If there is no other engine,
        the tree stays.
        """
        others = np.arange(len(self.engines)) != live.home.index
        with_room = others & self._occupancy.with_room(live.expected_tokens)
        engine = self._least_loaded(with_room) or self._least_loaded(others)
        if engine is not None:
            live.home.trees.remove(live)
            live.home = engine
            engine.trees.add(live)
            self._occupancy.move(live.place, engine.index)

    def count_tokens(self, tokens: int) -> None:
        """Count tokens by which any tree has grown."""
        self._tokens += tokens

    def leaf_ended(self, live: LiveTree) -> None:
        """Count the end of one of the tree's paths."""
        live.leaves -= 1
        self._leaves += 1
        if not self._finished:
            self._occupancy.expect(self._first_expectation())
        self._measure(live)

    def round_ended(self, live: LiveTree) -> None:
        """Measure a tree whose path requests are complete. Call it before the tree advances."""
        for leaves, tokens in live.tree.held():
            live.held[leaves] = max(live.held[leaves], tokens)
        self._measure(live)

    def tree_finished(self, live: LiveTree) -> None:
        """Learn from a complete tree, which has been removed: later trees are expected to be like it."""
        self._finished.append(np.maximum.accumulate(live.held))
        self._occupancy.expect(np.mean(self._finished, axis=0))

    def _first_expectation(self) -> np.ndarray:
        """The estimate before any tree has finished: a leaf to come costs what a leaf has cost so far.

        The tokens of unfinished paths count too, and short paths end first, so the estimate starts too high
        and falls. Before any path has ended it is the most that a tree can hold.
        """
        tokens = self._largest_tree
        if self._leaves:
            tokens = min(tokens, self._tokens * self._width / self._leaves)
        return tokens * np.arange(self._width + 1) / self._width

    def _measure(self, live: LiveTree) -> None:
        self._occupancy.measure(live.place, live.leaves, live.tree.above())

    def _least_loaded(self, among: np.ndarray) -> RoutedEngine | None:
        index = self._occupancy.least_loaded(among)
        return None if index is None else self.engines[index]
