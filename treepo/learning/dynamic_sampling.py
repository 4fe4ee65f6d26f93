"""Dynamic sampling (DAPO, section 3.2): fill a batch with trees that have something to teach.

If all graded leaves of a tree have the same reward, its advantages are 0. Such a tree is dropped and another
prompt is sampled in its place, for a bounded number of rounds. One sampler fills one batch and knows neither
engines nor the loop:

    sampler = DynamicSampler(target, max_refills)
    while missing := sampler.missing():
        sampler.offer(sample(missing))
    sampler.batch, sampler.dropped
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from treepo.tree import Tree


class Dropped(StrEnum):
    """Why a tree is not trained."""

    EQUAL = "equal"  # all graded leaves have the same reward
    UNGRADED = "ungraded"  # fewer than two leaves could be graded


def uninformative(tree: Tree) -> Dropped | None:
    """Say why `tree` has nothing to teach; None if it has."""
    rewards = [leaf.reward for leaf in tree.leaves if leaf.reward is not None]
    if len(rewards) < 2:
        return Dropped.UNGRADED
    return Dropped.EQUAL if min(rewards) == max(rewards) else None


class DynamicSampler:
    """Collects one batch. target: its trees. max_refills: rounds of sampling after the first.

    batch: the trees to train, fewer than `target` if the refills did not suffice. dropped: how many trees
    were dropped, by reason.
    """

    def __init__(self, target: int, max_refills: int) -> None:
        self._target = target
        self._rounds_left = 1 + max_refills
        self.batch: list[Tree] = []
        self.dropped: Counter[Dropped] = Counter(dict.fromkeys(Dropped, 0))

    def missing(self) -> int:
        """Prompts to sample next; 0 once the batch is full or its refills are used up."""
        return self._target - len(self.batch) if self._rounds_left else 0

    def offer(self, trees: Sequence[Tree]) -> None:
        """Take the graded trees of one round of sampling, at most as many as are missing."""
        assert len(trees) <= self.missing()
        self._rounds_left -= 1
        for tree in trees:
            reason = uninformative(tree)
            if reason is None:
                self.batch.append(tree)
            else:
                self.dropped[reason] += 1
