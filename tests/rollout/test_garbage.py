"""While trees grow, Python passes over none of the objects that were there before; later it does again."""

import gc
import weakref

import pytest

from treepo.rollout.garbage import rare_collections


class Node:
    itself: "Node"


def cycle() -> "weakref.ref[Node]":
    node = Node()
    node.itself = node
    return weakref.ref(node)


def test_the_settings_come_back_also_after_an_error() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()

    def fails() -> None:
        with rare_collections():
            assert gc.get_threshold() != before[0]
            assert gc.get_freeze_count() > before[1]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before[0], 0)


def test_cycles_from_before_within_and_after_are_collected() -> None:
    before = cycle()
    with rare_collections():
        assert before() is None
        within = cycle()
        gc.collect()
        assert within() is None
        late = cycle()
    gc.collect()
    assert late() is None
