"""On how many nodes a run sits, and who is near whom, before there is a cluster.

Nodes are as `plan.devices_per_node` says; on `plan.device: cpu` everything is on one, this machine.
"""

from dataclasses import dataclass
from math import ceil

from treepo.cluster.placement import Node, needs, on_one_machine, plan, run_layout
from treepo.config.run import RunConfig
from treepo.errors import PlacementError


@dataclass(frozen=True, slots=True)
class Places:
    """devices: that are used, on a CPU processes. one_machine: whether every engine is on the node of the
    trainer's rank 0. problem: why no number of nodes would do.
    """

    devices: int
    nodes: int
    one_machine: bool
    problem: str | None = None


def places(config: RunConfig) -> Places:
    """By the planner of real runs, on as many nodes as it takes."""
    layout, on_cpu = run_layout(config), config.plan.device == "cpu"
    apart = layout.ranks + layout.engines * layout.tensor
    devices = layout.ranks if config.placement == "colocated" and not on_cpu else apart
    if on_cpu:
        return Places(devices, 1, one_machine=True)
    per_node = config.plan.devices_per_node
    least = ceil(devices / per_node)
    for count in range(least, least + layout.engines + 2):  # groups that do not divide a node leave gaps
        nodes = [Node(str(index), f"node {index}", cpus=2 * apart, gpus=per_node) for index in range(count)]
        try:
            placed = plan(layout, nodes)
        except PlacementError:
            continue
        return Places(devices, count, on_one_machine(placed))
    try:
        problem = f"{needs(layout, on_gpus=True)}; nodes of {per_node} do not hold that, however many"
    except PlacementError as error:
        problem = str(error)
    return Places(devices, least, one_machine=False, problem=problem)


def on_one_node(config: RunConfig, ranks: int) -> bool:
    """Whether so many trainer ranks in a row are near each other."""
    return config.plan.device == "cpu" or ranks <= config.plan.devices_per_node


def ranks_of_a_node(config: RunConfig, ranks: int) -> int:
    """Of so many ranks in all, those of a full node."""
    return ranks if config.plan.device == "cpu" else min(ranks, config.plan.devices_per_node)
