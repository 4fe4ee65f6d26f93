"""Nodes of a planned run, and the transports that reach its engines."""

from typing import Any

from tests.support.plan_configs import config
from treepo.planning.nodes import footprint, transport_problem


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
