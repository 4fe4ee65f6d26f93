"""Dynamic sampling: which trees can teach. tests/training covers their replacement."""

from tests.support.small_trees import tree_of
from treepo.learning.dynamic_sampling import Dropped, uninformative
from treepo.tree import Tree


def graded(*rewards: float | None) -> Tree:
    return tree_of([-1] * len(rewards), rewards)


def test_a_tree_teaches_if_its_graded_rewards_differ() -> None:
    assert uninformative(graded(1.0, -1.0)) is None
    assert uninformative(graded(1.0, None, -1.0)) is None
    assert uninformative(graded(1.0, 1.0)) is Dropped.EQUAL
    assert uninformative(graded(1.0, None)) is Dropped.UNGRADED
    assert uninformative(graded(None, None)) is Dropped.UNGRADED
