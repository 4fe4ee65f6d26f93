"""What the trees of all engines are expected to hold, in arrays: one for engines, one for trees.

An estimate that changes with every finished tree, and a choice among all engines for every new tree, would
cost a thousand engines most of the driver's time if each engine and tree were visited in turn.

Units: tokens of the KV cache.
"""

from collections.abc import Sequence

import numpy as np

_UNBOUNDED = np.iinfo(np.int64).max
_PLACES = 64  # for trees at first


class Occupancy:
    """kv_tokens: of each engine; None: unbounded. max_trees: on one engine, whatever they hold; None: as many
    as its cache keeps.

    Arrays by engine. failures: failed requests since its last answer. leaves: still to come, summed over its
    trees. trees: their number. expected_tokens: summed over them.
    """

    def __init__(self, kv_tokens: Sequence[int | None], max_trees: int | None) -> None:
        engines = len(kv_tokens)
        self._kv_tokens = np.array([_UNBOUNDED if one is None else one for one in kv_tokens], dtype=np.int64)
        self._max_trees = max_trees
        self.failures, self.leaves, self.trees, self.expected_tokens = np.zeros((4, engines), dtype=np.int64)
        self._expected = np.zeros(1, dtype=np.int64)  # response tokens of a tree, by its leaves to come
        # By place, one for each tree. A place without a tree belongs to one engine more than there are.
        self._free: list[int] = []
        self._engine, self._to_come, self._prompt, self._above, self._tokens = np.zeros(
            (5, 0), dtype=np.int64
        )

    def with_room(self, expected: int) -> np.ndarray:
        """Engines with room for a new tree that is expected to hold `expected` tokens: bool [engines].

        An engine without trees admits any.
        """
        if self._max_trees is not None:
            return self.trees < self._max_trees
        return (self.trees == 0) | (self.expected_tokens + expected <= self._kv_tokens)

    def least_loaded(self, among: np.ndarray) -> int | None:
        """The engine with the fewest leaves to come, the first of equals; None if `among` has none.

        Failures count first, because an engine that fails its requests soon has few leaves to come.
        """
        engines = np.flatnonzero(among)
        if not len(engines):
            return None
        failures = self.failures[engines]
        if failures.any():
            engines = engines[failures == failures.min()]
        return int(engines[self.leaves[engines].argmin()])

    def expected_response(self, to_come: int) -> int:
        """Response tokens that a tree is expected to hold while `to_come` of its leaves are to come."""
        return int(self._expected[to_come])

    def expect(self, expected: np.ndarray) -> None:
        """Change what trees are expected to hold, by their leaves to come (float [width + 1])."""
        self._expected = expected.astype(np.int64)
        self._tokens = self._prompt + np.maximum(self._expected[self._to_come], self._above)
        engines = len(self.trees)
        sums = np.bincount(self._engine, weights=self._tokens, minlength=engines)  # exact below 2^53
        self.expected_tokens = sums[:engines].astype(np.int64)

    def tree_tokens(self, place: int) -> int:
        """What the tree is expected to hold, its prompt included."""
        return int(self._tokens[place])

    def add(self, engine: int, to_come: int, prompt_tokens: int) -> int:
        """Add a tree with `to_come` leaves to come; returns its place."""
        if not self._free:
            self._enlarge()
        place = self._free.pop()
        self._engine[place], self._prompt[place] = engine, prompt_tokens
        self.trees[engine] += 1
        self.measure(place, to_come, 0)
        return place

    def remove(self, place: int) -> None:
        self._take_off(place)
        self._engine[place] = len(self.trees)
        self._to_come[place] = self._prompt[place] = self._above[place] = self._tokens[place] = 0
        self._free.append(place)

    def move(self, place: int, engine: int) -> None:
        self._take_off(place)
        self._engine[place] = engine
        self.trees[engine] += 1
        self.leaves[engine] += self._to_come[place]
        self.expected_tokens[engine] += self._tokens[place]

    def measure(self, place: int, to_come: int, above: int) -> None:
        """Count the tree anew. above: response tokens on its unfinished paths, a shared token once."""
        engine, tokens = self._engine[place], int(self._prompt[place])
        tokens += max(int(self._expected[to_come]), above)
        self.leaves[engine] += to_come - self._to_come[place]
        self.expected_tokens[engine] += tokens - self._tokens[place]
        self._to_come[place], self._above[place], self._tokens[place] = to_come, above, tokens

    def _take_off(self, place: int) -> None:
        engine = self._engine[place]
        self.trees[engine] -= 1
        self.leaves[engine] -= self._to_come[place]
        self.expected_tokens[engine] -= self._tokens[place]

    def _enlarge(self) -> None:
        """Make room for as many trees again."""
        places = len(self._engine)
        further = max(places, _PLACES)
        self._engine = np.append(self._engine, np.full(further, len(self.trees)))
        zeros = np.zeros(further, dtype=np.int64)
        self._to_come, self._prompt = np.append(self._to_come, zeros), np.append(self._prompt, zeros)
        self._above, self._tokens = np.append(self._above, zeros), np.append(self._tokens, zeros)
        self._free += range(places + further - 1, places - 1, -1)
