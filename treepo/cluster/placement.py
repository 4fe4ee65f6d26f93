"""Decides which node runs each trainer rank and each engine.

Pure arithmetic on the nodes that the cluster reports, so that a layout that does not fit is refused before
anything starts. Ranks and engines that must be on one node form a bundle. A device is a GPU. In a cluster
without GPUs, each engine and each trainer rank takes a CPU, and no device is shared.

`colocated`: engine i runs on the devices of the trainer ranks from i x engine.tensor on. Every device of an
    engine has a trainer rank; a rank's device may have no engine.
`split`: each engine and each tensor-parallel group of the trainer has devices of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from treepo.config.run import RunConfig
from treepo.errors import PlacementError

Placement = Literal["colocated", "split"]


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster with its total resources. name: its address, for messages."""

    id: str
    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The ranks and engines to place.

    ranks: of the trainer; 0 without one. group: size of a tensor-parallel group of the trainer, whose ranks
    are consecutive and must be on one node. tensor: ranks of one engine.
    """

    placement: Placement
    ranks: int
    group: int
    engines: int
    tensor: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """Trainer ranks and engines that must be on one node. gpus: their GPUs; 0 in a cluster without any."""

    ranks: range
    engines: range
    gpus: int

    @property
    def cpus(self) -> int:
        return len(self.ranks) + len(self.engines)


def run_layout(config: RunConfig) -> Layout:
    """The layout of a training run."""
    parallel, engine = config.trainer.parallel, config.engine
    return Layout(config.placement, parallel.ranks, parallel.tensor, engine.count, engine.tensor)


def plan(layout: Layout, nodes: Sequence[Node]) -> list[tuple[Bundle, Node]]:
    """Place every bundle on a node. Raises PlacementError with the arithmetic if they do not fit.

    First fit, largest bundles first. If the bundles' sizes divide each other, as in real layouts, this finds
    a placement whenever there is one.
    """
    bundles = _bundles(layout, _on_gpus(nodes))
    free = [(node.gpus, node.cpus) for node in nodes]
    placed: dict[int, Node] = {}
    for index in sorted(range(len(bundles)), key=lambda i: (-bundles[i].gpus, -bundles[i].cpus)):
        need = bundles[index]
        fitting = (i for i, (gpus, cpus) in enumerate(free) if gpus >= need.gpus and cpus >= need.cpus)
        at = next(fitting, None)
        if at is None:
            there = "; ".join(f"{node.name} has {node.gpus} GPUs and {node.cpus} CPUs" for node in nodes)
            raise PlacementError(f"{_needs(layout, bundles)}, and do not fit into the cluster: {there}")
        free[at] = free[at][0] - need.gpus, free[at][1] - need.cpus
        placed[index] = nodes[at]
    return [(bundle, placed[index]) for index, bundle in enumerate(bundles)]


def shares_devices(layout: Layout, nodes: Sequence[Node]) -> bool:
    """Whether engines use the memory of the trainer's devices."""
    return _is_shared(layout, _on_gpus(nodes))


def on_one_machine(placed: Sequence[tuple[Bundle, Node]]) -> bool:
    """Whether every engine is on the node of trainer rank 0."""
    first = {node.id for bundle, node in placed if 0 in bundle.ranks}
    return {node.id for bundle, node in placed if bundle.engines} <= first


def demand(layout: Layout, nodes: Sequence[Node]) -> tuple[int, int]:
    """Total GPUs and CPUs of the layout; 0 GPUs if no node has any."""
    bundles = _bundles(layout, _on_gpus(nodes))
    return sum(bundle.gpus for bundle in bundles), sum(bundle.cpus for bundle in bundles)


def needs(layout: Layout, *, on_gpus: bool) -> str:
    """The layout's needs in words. Raises PlacementError if colocated engines outnumber the devices."""
    return _needs(layout, _bundles(layout, on_gpus))


def _bundles(layout: Layout, on_gpus: bool) -> list[Bundle]:
    return _shared(layout) if _is_shared(layout, on_gpus) else _separate(layout, on_gpus)


def _is_shared(layout: Layout, on_gpus: bool) -> bool:
    return layout.placement == "colocated" and layout.ranks > 0 and on_gpus


def _on_gpus(nodes: Sequence[Node]) -> bool:
    return any(node.gpus for node in nodes)


def _separate(layout: Layout, on_gpus: bool) -> list[Bundle]:
    groups = [
        Bundle(group, range(0), len(group) if on_gpus else 0) for group in _parts(layout.ranks, layout.group)
    ]
    gpus = layout.tensor if on_gpus else 0
    return groups + [Bundle(range(0), range(i, i + 1), gpus) for i in range(layout.engines)]


def _shared(layout: Layout) -> list[Bundle]:
    """Bundles whose borders cross neither a group of the trainer nor an engine."""
    tensor, devices = layout.tensor, layout.engines * layout.tensor
    if devices > layout.ranks:
        raise PlacementError(
            f"placement = colocated: engine.count x engine.tensor = {layout.engines} x {tensor} = {devices} "
            f"devices, but trainer.parallel has {layout.ranks} ranks, one a device; an engine needs a rank "
            "on each of its devices (or placement = split)"
        )
    return [
        Bundle(
            part,
            range(min(part.start // tensor, layout.engines), min(part.stop // tensor, layout.engines)),
            len(part),
        )
        for part in _parts(layout.ranks, math.lcm(layout.group, tensor))
    ]


def _parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _needs(layout: Layout, bundles: Sequence[Bundle]) -> str:
    wanted: list[str] = []
    if layout.ranks:
        wanted.append(f"{layout.ranks} trainer ranks in groups of {layout.group} (trainer.parallel)")
    if layout.engines:
        wanted.append(f"{layout.engines} engines of {layout.tensor} (engine.count, engine.tensor)")
    gpus, cpus = sum(bundle.gpus for bundle in bundles), sum(bundle.cpus for bundle in bundles)
    need = f"{gpus} GPUs and {cpus} CPUs" if gpus else f"{cpus} CPUs"
    largest = max(bundle.gpus for bundle in bundles)
    together = f", {largest} of the GPUs on one node" if largest > 1 else ""
    return f"placement = {layout.placement}: {' and '.join(wanted)} need {need}{together}"
