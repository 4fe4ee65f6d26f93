"""Dynamic sampling (DAPO, section 3.2): fill a batch with trees that can teach something.

A tree whose graded leaves all have the same reward has no advantage to learn from; it is dropped and another
prompt is sampled instead, in a bounded number of refills. Trees beyond the batch wait for the next one, and
are dropped there if the weights have moved on too far. Knows neither engines nor the loop:

    sampler.start(version)
    while missing := sampler.missing():
        sampler.offer(sample(missing))
    trees, dropped = sampler.take()
"""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

from treepo.tree import Tree


class Dropped(StrEnum):
    """Why a tree is in no batch."""

    EQUAL = "equal"  # all graded leaves have the same reward
    UNGRADED = "ungraded"  # fewer than two leaves could be graded
    STALE = "stale"  # it waited for a batch whose weights are too far from those that sampled it


def uninformative(tree: Tree) -> Dropped | None:
    """Why `tree` has nothing to teach; None where it has."""
    rewards = [leaf.reward for leaf in tree.leaves if leaf.reward is not None]
    if len(rewards) < 2:
        return Dropped.UNGRADED
    return Dropped.EQUAL if min(rewards) == max(rewards) else None


class DynamicSampler:
    """target: trees in a batch. max_refills: rounds of sampling beyond the first.
    max_staleness: versions that a waiting tree's oldest segment may lag behind the batch's weights.
    """

    def __init__(self, target: int, max_refills: int, max_staleness: int) -> None:
        self._target = target
        self._max_refills = max_refills
        self._max_staleness = max_staleness
        self._kept: list[Tree] = []
        self._rounds = 0
        self._dropped: Counter[Dropped] = Counter()

    def start(self, version: int) -> None:
        """Begin a batch that trains weights `version`; of the trees that wait, the oldest go first."""
        fresh = [
            tree
            for tree in self._kept
            if version - min(segment.version for segment in tree.segments) <= self._max_staleness
        ]
        self._rounds = 0
        self._dropped = Counter({Dropped.STALE: len(self._kept) - len(fresh)})
        self._kept = fresh

    def missing(self) -> int:
        """Prompts to sample next; 0 once the batch is full or its refills are used up."""
        if self._rounds > self._max_refills:
            return 0
        return max(self._target - len(self._kept), 0)

    def offer(self, trees: Iterable[Tree]) -> None:
        """The graded trees of one round of sampling."""
        self._rounds += 1
        for tree in trees:
            reason = uninformative(tree)
            if reason is None:
                self._kept.append(tree)
            else:
                self._dropped[reason] += 1

    def take(self) -> tuple[list[Tree], dict[Dropped, int]]:
        """The batch, short where the refills did not suffice, and what was dropped on the way to it."""
        batch, self._kept = self._kept[: self._target], self._kept[self._target :]
        return batch, {reason: self._dropped[reason] for reason in Dropped}
