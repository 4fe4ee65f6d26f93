"""Dynamic sampling (DAPO, section 3.2): which trees have nothing to teach.

If all graded leaves of a tree have the same reward, its advantages are 0. Such a tree is dropped, and
`treepo.training.scheduler` starts another prompt in its place.
"""

from enum import StrEnum

from treepo.tree import Tree


class Dropped(StrEnum):
    """Why a tree is not trained, and another prompt takes its place."""

    EQUAL = "equal"  # all graded leaves have the same reward
    UNGRADED = "ungraded"  # fewer than two leaves could be graded


def uninformative(tree: Tree) -> Dropped | None:
    """Say why `tree` has nothing to teach; None if it has."""
    rewards = [leaf.reward for leaf in tree.leaves if leaf.reward is not None]
    if len(rewards) < 2:
        return Dropped.UNGRADED
    return Dropped.EQUAL if min(rewards) == max(rewards) else None
