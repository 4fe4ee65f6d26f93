"""Dynamic sampling: only trees that can teach, in bounded rounds, and every tree is accounted for."""

import numpy as np
import pytest

from tests.support.small_trees import tree_of
from treepo.learning.dynamic_sampling import Dropped, DynamicSampler, uninformative
from treepo.tree import Tree


def graded(*rewards: float | None) -> Tree:
    return tree_of([-1] * len(rewards), rewards)


def test_a_tree_teaches_if_its_graded_rewards_differ() -> None:
    assert uninformative(graded(1.0, -1.0)) is None
    assert uninformative(graded(1.0, None, -1.0)) is None
    assert uninformative(graded(1.0, 1.0)) is Dropped.EQUAL
    assert uninformative(graded(1.0, None)) is Dropped.UNGRADED
    assert uninformative(graded(None, None)) is Dropped.UNGRADED


def test_refills_ask_for_what_is_missing_and_no_more() -> None:
    sampler = DynamicSampler(target=3, max_refills=5)
    assert sampler.missing() == 3
    sampler.offer([graded(1.0, -1.0), graded(1.0, 1.0), graded(None, 1.0)])
    assert sampler.missing() == 2
    sampler.offer([graded(0.0, 1.0), graded(0.5, 1.0)])
    assert sampler.missing() == 0
    assert len(sampler.batch) == 3
    assert sampler.dropped == {Dropped.EQUAL: 1, Dropped.UNGRADED: 1}


def test_refills_are_bounded_and_the_batch_may_be_short() -> None:
    sampler = DynamicSampler(target=2, max_refills=2)
    rounds = 0
    while missing := sampler.missing():
        rounds += 1
        sampler.offer([graded(1.0, 1.0)] * missing)
    assert rounds == 3
    assert sampler.batch == []
    assert sampler.dropped == {Dropped.EQUAL: 6, Dropped.UNGRADED: 0}


def test_a_round_without_trees_counts_too() -> None:
    sampler = DynamicSampler(target=1, max_refills=1)
    sampler.offer([])
    sampler.offer([])
    assert sampler.missing() == 0


@pytest.mark.parametrize("seed", range(30))
def test_no_tree_is_lost_or_doubled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sampler = DynamicSampler(target=5, max_refills=2)
    offered: list[Tree] = []
    while missing := sampler.missing():
        # A tree that could not be sampled is not offered.
        trees = [graded(*rng.choice([-1.0, 1.0], size=2)) for _ in range(rng.integers(0, missing + 1))]
        offered += trees
        sampler.offer(trees)
    assert sampler.batch == [tree for tree in offered if uninformative(tree) is None]
    assert len(offered) == len(sampler.batch) + sampler.dropped.total()
