"""Dynamic sampling: only trees that can teach, in bounded rounds, and every tree is accounted for."""

from dataclasses import replace

import numpy as np

from tests.support.small_trees import tree_of
from treepo.learning.dynamic_sampling import Dropped, DynamicSampler, uninformative
from treepo.tree import Tree


def graded(*rewards: float | None, version: int = 0) -> Tree:
    tree = tree_of([-1] * len(rewards), rewards)
    return replace(tree, segments=tuple(replace(segment, version=version) for segment in tree.segments))


def test_a_tree_teaches_where_its_graded_rewards_differ() -> None:
    assert uninformative(graded(1.0, -1.0)) is None
    assert uninformative(graded(1.0, None, -1.0)) is None
    assert uninformative(graded(1.0, 1.0)) is Dropped.EQUAL
    assert uninformative(graded(1.0, None)) is Dropped.UNGRADED
    assert uninformative(graded(None, None)) is Dropped.UNGRADED


def test_refills_ask_for_what_is_missing_and_no_more() -> None:
    sampler = DynamicSampler(target=3, max_refills=5, max_staleness=0)
    sampler.start(version=0)
    assert sampler.missing() == 3
    sampler.offer([graded(1.0, -1.0), graded(1.0, 1.0), graded(None, 1.0)])
    assert sampler.missing() == 2
    sampler.offer([graded(0.0, 1.0), graded(0.5, 1.0)])
    assert sampler.missing() == 0
    batch, dropped = sampler.take()
    assert len(batch) == 3
    assert dropped == {Dropped.EQUAL: 1, Dropped.UNGRADED: 1, Dropped.STALE: 0}


def test_refills_are_bounded_and_the_batch_may_be_short() -> None:
    sampler = DynamicSampler(target=2, max_refills=2, max_staleness=0)
    sampler.start(version=0)
    rounds = 0
    while missing := sampler.missing():
        rounds += 1
        sampler.offer([graded(1.0, 1.0)] * missing)
    batch, dropped = sampler.take()
    assert rounds == 3
    assert batch == []
    assert dropped[Dropped.EQUAL] == 6
    sampler.start(version=1)
    assert sampler.missing() == 2  # each batch has its own refills


def test_trees_left_over_wait_as_long_as_their_version_allows() -> None:
    sampler = DynamicSampler(target=1, max_refills=0, max_staleness=1)
    sampler.start(version=4)
    kept = [graded(1.0, -1.0, version=version) for version in (4, 3, 4)]
    sampler.offer(kept)
    assert sampler.take()[0] == [kept[0]]
    sampler.start(version=5)  # the tree of version 3 is two versions behind
    assert sampler.missing() == 0
    batch, dropped = sampler.take()
    assert batch == [kept[2]]
    assert dropped[Dropped.STALE] == 1


def test_a_mixed_tree_is_as_old_as_its_oldest_segment() -> None:
    sampler = DynamicSampler(target=1, max_refills=0, max_staleness=1)
    sampler.start(version=2)
    tree = graded(1.0, -1.0, version=2)
    old = replace(tree, segments=(replace(tree.segments[0], version=1), tree.segments[1]))
    sampler.offer([tree, old])
    sampler.take()
    sampler.start(version=3)
    assert sampler.missing() == 1


def test_no_tree_is_lost_or_doubled() -> None:
    rng = np.random.default_rng(0)
    sampler = DynamicSampler(target=5, max_refills=2, max_staleness=2)
    offered, trained, dropped_trees = 0, [], 0
    for version in range(30):
        sampler.start(version)
        while missing := sampler.missing():
            trees = [
                graded(*rng.choice([-1.0, 1.0], size=2), version=version)
                for _ in range(missing + int(rng.integers(0, 4)))  # a loop may sample more than it must
            ]
            offered += len(trees)
            sampler.offer(trees)
        batch, dropped = sampler.take()
        assert len(batch) <= 5
        assert all(uninformative(tree) is None for tree in batch)
        trained += batch
        dropped_trees += sum(dropped.values())
    assert len(set(map(id, trained))) == len(trained)
    waiting = 0
    while rest := sampler.take()[0]:
        waiting += len(rest)
    assert waiting <= 3 * 4  # at most what the last rounds had over
    assert offered == len(trained) + dropped_trees + waiting
