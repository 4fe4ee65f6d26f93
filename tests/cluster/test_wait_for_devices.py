"""Waiting for a cluster's nodes, on a fake cluster that grows step by step."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from treepo.cluster.placement import Layout, Node
from treepo.cluster.wait_for_devices import wait_for_devices
from treepo.errors import ClusterError, PlacementError

FOUR_RANKS_TWO_ENGINES = Layout("split", ranks=4, group=4, engines=2, tensor=2)
HOSTS = ("10.0.0.1", "10.0.0.2", "10.0.0.3")


def cluster(*gpus: int, cpus: int = 16) -> list[Node]:
    return [Node(f"id-{host}", host, cpus, count) for host, count in zip(HOSTS, gpus, strict=False)]


def wait(
    growth: Sequence[list[Node]], nodes: int, *, seconds: float = 60, may_grow: bool = False
) -> tuple[list[str], int]:
    """Wait while the cluster grows through the states in `growth`; returns the lines and the looks taken."""
    said: list[str] = []
    looks = 0
    states: Iterator[list[Node]] = iter(growth)
    there: list[Node] = []

    async def look() -> list[Node]:
        nonlocal looks, there
        looks += 1
        there = next(states, there)
        return there

    def awaited(there: Sequence[Node]) -> list[str]:
        return [f"node {index}" for index in range(len(there), nodes)]

    asyncio.run(
        wait_for_devices(
            FOUR_RANKS_TWO_ENGINES,
            nodes,
            look,
            awaited,
            said.append,
            seconds=seconds,
            may_grow=may_grow,
            pause=0,
        )
    )
    return said, looks


def test_it_returns_at_the_last_node_and_says_each_state_once() -> None:
    said, looks = wait([cluster(), cluster(4), cluster(4), cluster(4, 2), cluster(4, 2, 2)], nodes=3)
    assert looks == 5
    assert said == [
        "0 of 3 nodes, 0 of 6 CPUs, waiting for node 0, node 1, node 2",
        "1 of 3 nodes, 4 of 8 GPUs, waiting for node 1, node 2",
        "2 of 3 nodes, 6 of 8 GPUs, waiting for node 2",
    ]


def test_a_head_without_gpus_does_not_make_a_cluster_without_gpus() -> None:
    """The layout would fit into the head's CPUs, but nodes with GPUs are still missing."""
    _, looks = wait([cluster(0), cluster(0), cluster(0, 8)], nodes=2)
    assert looks == 3


def test_a_layout_that_does_not_fit_into_all_nodes_is_refused_at_once() -> None:
    with pytest.raises(PlacementError, match=r"need 8 GPUs .* 10.0.0.1 has 4 GPUs .* 10.0.0.2 has 2 GPUs"):
        wait([cluster(4), cluster(4, 2)], nodes=2)


def test_a_cluster_that_may_grow_is_waited_for() -> None:
    growing = [cluster(4), cluster(4, 2), cluster(4, 2, 2)]
    said, looks = wait(growing, nodes=1, may_grow=True)
    assert looks == 3
    assert said[0] == "1 of 1 nodes, 4 of 8 GPUs"
    with pytest.raises(PlacementError, match=r"after 0.01 s: .* need 8 GPUs"):
        wait(growing[:2], nodes=1, seconds=0.01, may_grow=True)


def test_the_deadline_says_what_is_missing() -> None:
    with pytest.raises(
        ClusterError, match=r"still missing after 0.01 s: 1 of 2 nodes, 8 of 8 GPUs, waiting for node 1$"
    ) as caught:
        wait([cluster(8)], nodes=2, seconds=0.01)
    assert caught.value.exit_code == 1
