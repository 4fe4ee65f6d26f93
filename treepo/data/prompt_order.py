"""The order in which training takes prompts, of one file or of a mixture of files.

A position is the number of prompts before one since the start of training. It determines the prompt: a
resumed run needs nothing else.

In a mixture the files take turns. Turn t of a file is its prompt t, counted through its own epochs, so its
order does not depend on the other files. Among the first n positions each file has its share to within one
prompt: turn t of a file with share w lies in the positions floor(t / w) to ceil((t + 1) / w) - 1, and of the
files that may come, the one whose last position is nearest does. Shares that add up to 1 always have such an
order (Baruah et al. 1996, "Proportionate progress"). With weights 3 and 1 it is A A B A, repeated.
"""

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np

from treepo.rollout import rng


class TrainingOrder(Protocol):
    """Prompts by position. sizes: prompts of each file."""

    sizes: tuple[int, ...]

    def __len__(self) -> int:
        """Number of prompts in all files."""
        ...

    def index(self, position: int) -> int:
        """Index of the prompt at the position; the files' prompts are numbered one file after another."""
        ...

    def turn(self, position: int) -> tuple[int, int]:
        """The file whose prompt is at the position, and the number of its turns before."""
        ...

    def position(self, file: int, turn: int) -> int:
        """Where a turn of a file is: the inverse of `turn`."""
        ...

    def turns_before(self, file: int, position: int) -> int:
        """The number of turns that a file has below the position."""
        ...

    @property
    def largest_step(self) -> int:
        """The most positions in a row, wherever they begin, in which no file has more turns than prompts."""
        ...


class PromptOrder:
    """The order of one file's n prompts: epoch after epoch, each a permutation drawn from the seed.

    name: of a file in a mixture, whose order is its own.
    """

    def __init__(self, n: int, seed: int, name: str | None = None) -> None:
        self.sizes = (n,)
        self._n = n
        self._key = ("prompt order", seed) if name is None else ("prompt order", seed, name)
        # A tree that is sampled again may be of the epoch before the newest one.
        self._permutation = lru_cache(maxsize=2)(self._drawn_permutation)

    def __len__(self) -> int:
        return self._n

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, self._n)
        return int(self._permutation(epoch)[offset])

    def turn(self, position: int) -> tuple[int, int]:
        return 0, position

    def position(self, file: int, turn: int) -> int:
        assert file == 0
        return turn

    def turns_before(self, file: int, position: int) -> int:
        assert file == 0
        return position

    @property
    def largest_step(self) -> int:
        return self._n

    def _drawn_permutation(self, epoch: int) -> np.ndarray:
        return rng.generator(*self._key, epoch).permutation(self._n)


class MixtureOrder:
    """The order of the prompts of several files, which take turns by whole weights."""

    def __init__(self, sizes: Mapping[str, int], weights: Sequence[int], seed: int) -> None:
        """sizes: prompts of each file, by name."""
        self.sizes = tuple(sizes.values())
        self._orders = [PromptOrder(n, seed, name) for name, n in sizes.items()]
        self._starts = list(accumulate(self.sizes, initial=0))
        self._cycle = one_cycle(tuple(weights))
        self._places = [np.flatnonzero(self._cycle == file) for file in range(len(weights))]
        self._turns = np.empty(len(self._cycle), np.int64)
        for places in self._places:
            self._turns[places] = np.arange(len(places))

    def __len__(self) -> int:
        return self._starts[-1]

    def index(self, position: int) -> int:
        file, turn = self.turn(position)
        return self._starts[file] + self._orders[file].index(turn)

    def turn(self, position: int) -> tuple[int, int]:
        cycle, offset = divmod(position, len(self._cycle))
        file = int(self._cycle[offset])
        return file, cycle * len(self._places[file]) + int(self._turns[offset])

    def position(self, file: int, turn: int) -> int:
        cycle, place = divmod(turn, len(self._places[file]))
        return cycle * len(self._cycle) + int(self._places[file][place])

    def turns_before(self, file: int, position: int) -> int:
        cycle, offset = divmod(position, len(self._cycle))
        places = self._places[file]
        return cycle * len(places) + int(np.searchsorted(places, offset))

    def most_turns(self, file: int, window: int) -> int:
        """The most turns that a file has among `window` positions in a row, wherever they begin."""
        length, places = len(self._cycle), self._places[file]
        begin = np.arange(length)
        cycles, end = np.divmod(begin + window, length)
        found = cycles * len(places) + np.searchsorted(places, end) - np.searchsorted(places, begin)
        return int(found.max())

    @property
    def largest_step(self) -> int:
        def too_many(positions: int) -> bool:
            return any(self.most_turns(file, positions) > size for file, size in enumerate(self.sizes))

        return bisect_left(range(1, len(self) + 1), True, key=too_many)


@lru_cache(maxsize=1)  # preflight, the log and each attempt of a run ask for the same one
def one_cycle(weights: tuple[int, ...]) -> np.ndarray:
    """The file at each position until every file has had as many turns as its weight: int32 [sum of weights].

    From there on the order repeats. Costs log(files) a position.
    """
    total = sum(weights)
    cycle = np.empty(total, np.int32)
    turns = [0] * len(weights)
    early = [(0, file) for file in range(len(weights))]  # the first position of each file's next turn
    due: list[tuple[int, int]] = []  # of the files that may come: the first position that is too late
    for position in range(total):
        while early and early[0][0] <= position:
            _, file = heapq.heappop(early)
            heapq.heappush(due, (-(-(turns[file] + 1) * total // weights[file]), file))
        limit, file = heapq.heappop(due)
        assert position < limit, "a file would be more than one prompt behind its share"
        cycle[position] = file
        turns[file] += 1
        heapq.heappush(early, (turns[file] * total // weights[file], file))
    cycle.flags.writeable = False
    return cycle
