"""Nodes of a run before there is a cluster: how many it takes, and which processes share one.

Nodes are as `plan.devices_per_node` says. With `plan.device: cpu` everything is on one node, this machine.
"""

from dataclasses import dataclass
from math import ceil

from treepo.cluster.placement import Node, divided, needs, on_one_machine, plan, run_layout
from treepo.config.run import RunConfig
from treepo.errors import PlacementError
from treepo.planning.hardware import device


@dataclass(frozen=True, slots=True)
class Footprint:
    """Devices and nodes that a layout takes.

    devices: that it uses; on a CPU, processes. one_machine: whether every engine is on the node of trainer
    rank 0. problem: why no number of nodes holds the layout.
    """

    devices: int
    nodes: int
    one_machine: bool
    problem: str | None = None


def footprint(config: RunConfig) -> Footprint:
    """By the placement of real runs, on as few nodes as hold it."""
    layout, on_cpu = run_layout(config), config.plan.device == "cpu"
    apart = layout.ranks + layout.engines * layout.devices
    devices = layout.ranks if shares_devices(config) else apart
    if on_cpu:
        return Footprint(devices, 1, one_machine=True)
    per_node = config.plan.devices_per_node
    layout = divided(layout, [Node("0", "node 0", cpus=2 * apart, gpus=per_node)])
    fewest = ceil(devices / per_node)
    for count in range(fewest, fewest + layout.shares + 2):  # groups that do not divide a node leave gaps
        nodes = [Node(str(index), f"node {index}", cpus=2 * apart, gpus=per_node) for index in range(count)]
        try:
            placed = plan(layout, nodes)
        except PlacementError:
            continue
        return Footprint(devices, count, on_one_machine(placed))
    try:
        problem = f"{needs(layout, on_gpus=True)}; no number of nodes with {per_node} GPUs holds that"
    except PlacementError as error:
        problem = str(error)
    return Footprint(devices, fewest, one_machine=False, problem=problem)


def shares_devices(config: RunConfig) -> bool:
    """Whether trainer and engines take turns on the same GPUs."""
    return config.placement == "colocated" and config.plan.device != "cpu"


def ranks_per_node(config: RunConfig, ranks: int) -> int:
    """Ranks on the first node, if `ranks` consecutive ones fill node after node."""
    return ranks if config.plan.device == "cpu" else min(ranks, config.plan.devices_per_node)


def link_rate(config: RunConfig, ranks: int) -> float:
    """Bytes per second between `ranks` consecutive ranks: over the network unless one node has them all."""
    if ranks_per_node(config, ranks) == ranks:
        return device(config.plan.device).link
    return config.plan.network_gb_per_second * 1e9


def engine_link_rate(config: RunConfig, ranks: int) -> float:
    """Bytes per second between `ranks` consecutive ranks of an engine."""
    layout, hardware = run_layout(config), device(config.plan.device)
    if config.plan.device != "cpu":
        layout = divided(layout, [Node("0", "node 0", cpus=0, gpus=config.plan.devices_per_node)])
        if ranks > layout.share:
            return config.plan.network_gb_per_second * 1e9
    return hardware.link


def transport_problem(config: RunConfig, footprint: Footprint) -> str | None:
    """Why `weights.transport` cannot reach the engines on these nodes, in one line; None if it can."""
    shared = shares_devices(config)
    if config.weights.transport == "colocated" and not footprint.one_machine:
        return (
            "weights.transport = colocated needs every engine on the node of the trainer's rank 0; these are "
            f"on {footprint.nodes} nodes of {config.plan.devices_per_node} devices "
            f"({'host_broadcast' if shared else 'broadcast, host_broadcast'} and disk are allowed)"
        )
    if config.weights.transport == "broadcast" and shared:
        return (
            "weights.transport = broadcast with placement = colocated: NCCL takes one process a GPU "
            "(colocated, host_broadcast and disk are allowed)"
        )
    return None
