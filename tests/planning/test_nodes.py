"""Nodes of a planned run, and the transports that reach its engines."""

from typing import Any

from tests.support.plan_configs import config
from treepo.planning.hardware import device
from treepo.planning.nodes import engine_link_rate, footprint, transport_problem


def test_a_transport_that_cannot_reach_the_engines_is_a_problem() -> None:
    def problem(**settings: Any) -> str | None:
        given = config(**settings)
        return transport_problem(given, footprint(given))

    assert problem() is None
    apart = problem(plan_devices_per_node=2, trainer_parallel={"data": 4}, engine={"count": 4})
    assert apart is not None
    assert "2 nodes of 2 devices (host_broadcast and disk are allowed)" in apart
    # The second node's ranks have no engine beside them.
    assert problem(plan_devices_per_node=2, trainer_parallel={"data": 4}, engine={"count": 2}) is None
    assert "NCCL takes one process a GPU" in str(problem(weights_transport="broadcast"))
    assert problem(weights_transport="broadcast", placement="split") is None


def test_an_engine_larger_than_a_node_takes_several() -> None:
    """Eight trainer ranks, and an engine of two stages of eight devices: two nodes, that NVLink does not
    join.
    """
    split = config(placement="split", trainer_parallel={"data": 8}, engine={"tensor": 8, "pipeline": 2})
    taken = footprint(split)
    assert (taken.devices, taken.nodes, taken.one_machine, taken.problem) == (24, 3, False, None)
    assert engine_link_rate(split, 8) == device("h100").link
    assert engine_link_rate(split, 16) == 50e9
    shared = config(trainer_parallel={"data": 16}, engine={"tensor": 8, "pipeline": 2})
    taken = footprint(shared)
    assert (taken.devices, taken.nodes, taken.one_machine, taken.problem) == (16, 2, False, None)
    assert "every engine on the node of the trainer's rank 0" in str(transport_problem(shared, taken))
