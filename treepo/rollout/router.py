"""Which engine a tree lives on, and how many may live on one at once: as many as its KV cache keeps.

A prefix that is needed again must not be evicted meanwhile. So a tree is given room for the most that it
will hold on its unfinished paths; what has ended may leave the cache. How much that is follows from how many
leaves are to come: the average of what the trees that finished last had from there on. A tree that turns out
larger counts for what it has. A tree alone on an engine has room, whatever it needs.

Units: tokens of the KV cache. Arrays are indexed by the number of leaves to come, 0 to width.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from treepo.config.sampling import SamplingConfig
from treepo.protocols import Engine
from treepo.rollout.growing_tree import GrowingTree, longest_response

REMEMBERED_TREES = 64


@dataclass(slots=True, eq=False)
class Lane:
    """An engine, the trees that live on it, and their leaves that are still to come.

    capacity: KV tokens, None where unknown. failures: of its requests, since the last that it answered.
    needed: what its trees hold or will hold.
    """

    index: int
    engine: Engine
    capacity: int | None
    trees: "set[LiveTree]" = field(default_factory=set)
    leaves: int = 0
    failures: int = 0
    needed: int = 0

    @property
    def burden(self) -> tuple[int, int]:
        """The engine with the least of it is chosen. An engine that fails its requests soon has no leaves, so
        failures come first.
        """
        return self.failures, self.leaves


@dataclass(slots=True, eq=False)
class LiveTree:
    """A tree on a lane. leaves: still to come. needed: tokens that it counts for on its lane. above: response
    tokens above its unfinished paths' ends, when one of them or a round last ended.

    held: most response tokens on its unfinished paths at one time, while so many leaves were to come.
    """

    tree: GrowingTree
    lane: Lane
    leaves: int
    held: np.ndarray
    needed: int = 0
    above: int = 0


class Lanes:
    """All engines of a driver. capacities: KV tokens of each, None where trees are not bounded by them."""

    def __init__(
        self, engines: Sequence[Engine], sampling: SamplingConfig, capacities: Sequence[int] | None
    ) -> None:
        self.lanes = [
            Lane(index, engine, capacity)
            for index, (engine, capacity) in enumerate(
                zip(engines, capacities or [None] * len(engines), strict=True)
            )
        ]
        self._width = sampling.width
        self._max_live_trees = sampling.max_live_trees
        self._most = longest_response(sampling) * sampling.width
        self._tokens = 0  # in all trees so far, a shared token once
        self._leaves = 0  # ended in them
        self._finished: deque[np.ndarray] = deque(maxlen=REMEMBERED_TREES)
        self._expected = self._guess()

    def with_room(self, prompt_tokens: int) -> Lane | None:
        """The least burdened engine that has room for a new tree, None where none has."""
        needed = self.room_of_a_tree(prompt_tokens)
        return self._least([lane for lane in self.lanes if self._has_room(lane, needed)])

    def seat(self, tree: GrowingTree, lane: Lane) -> LiveTree:
        """A new tree on `lane`."""
        live = LiveTree(tree, lane, self._width, np.zeros(self._width + 1, dtype=np.int64))
        self._put(live, lane)
        return live

    def leave(self, live: LiveTree) -> None:
        """The tree ends, finished or not."""
        live.lane.trees.remove(live)
        live.lane.leaves -= live.leaves
        live.lane.needed -= live.needed

    def move(self, live: LiveTree) -> None:
        """To the least burdened other engine, one with room if there is any. What it holds is computed there
        anew; a tree that must leave is not kept waiting, and no new tree is seated before all have room.
        """
        others = [lane for lane in self.lanes if lane is not live.lane]
        roomy = [lane for lane in others if self._has_room(lane, live.needed)]
        if (lane := self._least(roomy or others)) is not None:
            self.leave(live)
            self._put(live, lane)

    def took(self, tokens: int) -> None:
        """Some tree has so many tokens more."""
        self._tokens += tokens

    def leaf_ended(self, live: LiveTree) -> None:
        live.leaves -= 1
        live.lane.leaves -= 1
        self._leaves += 1
        if not self._finished:
            self._expect(self._guess())
        self._look(live)

    def round_ended(self, live: LiveTree) -> None:
        """Called before the tree advances."""
        for leaves, tokens in live.tree.held():
            live.held[leaves] = max(live.held[leaves], tokens)
        self._look(live)

    def finished(self, live: LiveTree) -> None:
        """The tree has left with all its leaves: later ones are expected to be like it."""
        self._finished.append(np.maximum.accumulate(live.held))
        self._expect(np.mean(self._finished, axis=0))

    def _guess(self) -> np.ndarray:
        """Expectation before any tree has finished: so many leaves at what one has cost so far.

        The paths that have not ended count in this, so it starts too high and falls, as the first to end are
        the short ones. Before any has ended: the most that a tree can have.
        """
        whole = self._most
        if self._leaves:
            whole = min(whole, self._tokens * self._width / self._leaves)
        return whole * np.arange(self._width + 1) / self._width

    def _expect(self, expected: np.ndarray) -> None:
        self._expected = expected
        for lane in self.lanes:
            for live in lane.trees:
                self._count(live)

    def _look(self, live: LiveTree) -> None:
        live.above = live.tree.above()
        self._count(live)

    def _count(self, live: LiveTree) -> None:
        response = max(int(self._expected[live.leaves]), live.above)
        needed = len(live.tree.prompt.tokens) + response
        live.lane.needed += needed - live.needed
        live.needed = needed

    def room_of_a_tree(self, prompt_tokens: int) -> int:
        """What a new tree counts for: the most that those before it held at one time, on average."""
        return prompt_tokens + int(self._expected[self._width])

    def _has_room(self, lane: Lane, needed: int) -> bool:
        if not lane.trees:
            return True
        if self._max_live_trees is not None:
            return len(lane.trees) < self._max_live_trees
        return lane.capacity is None or lane.needed + needed <= lane.capacity

    def _least(self, lanes: Sequence[Lane]) -> Lane | None:
        return min(lanes, key=lambda lane: lane.burden, default=None)

    def _put(self, live: LiveTree, lane: Lane) -> None:
        live.lane = lane
        lane.trees.add(live)
        lane.leaves += live.leaves
        lane.needed += live.needed
        self._count(live)
