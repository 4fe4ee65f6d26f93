"""Decides which node runs each trainer rank and each engine.

Pure arithmetic on the nodes that the cluster reports, so that a layout that does not fit is refused before
anything starts. An engine has one share, or several equal ones on as many nodes; shares are numbered engine
after engine. Ranks and shares that must be on one node form a bundle. A device is a GPU. In a cluster without
GPUs, each share and each trainer rank takes a CPU, and no device is shared.

`colocated`: engine i runs on the devices of the trainer ranks from i x its number of devices on. Every device
    of an engine has a trainer rank; a rank's device may have no engine.
`split`: each share of an engine and each tensor-parallel group of the trainer has devices of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from treepo.config.engine import EngineConfig, node_counts
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
    are consecutive and must be on one node. tensor, pipeline: of one engine. nodes: of one engine; None if
    the cluster decides (`divided`).
    """

    placement: Placement
    ranks: int
    group: int
    engines: int
    tensor: int
    pipeline: int = 1
    nodes: int | None = None

    @property
    def devices(self) -> int:
        """Of one engine."""
        return self.tensor * self.pipeline

    @property
    def shares(self) -> int:
        """Of all engines. Of a layout that is `divided`, as `share`."""
        assert self.nodes is not None
        return self.engines * self.nodes

    @property
    def share(self) -> int:
        """Devices of one share of an engine."""
        assert self.nodes is not None
        return self.devices // self.nodes


@dataclass(frozen=True, slots=True)
class Bundle:
    """Trainer ranks and shares of engines that must be on one node. gpus: their GPUs; 0 in a cluster without
    any.
    """

    ranks: range
    shares: range
    gpus: int

    @property
    def cpus(self) -> int:
        return len(self.ranks) + len(self.shares)


def run_layout(config: RunConfig) -> Layout:
    """The layout of a training run."""
    parallel, engine = config.trainer.parallel, config.engine
    return Layout(
        config.placement,
        parallel.ranks,
        parallel.tensor,
        engine.count,
        engine.tensor,
        engine.pipeline,
        engine.nodes,
    )


def engines_layout(engine: EngineConfig) -> Layout:
    """The layout of engines without a trainer."""
    return Layout("split", 0, 1, engine.count, engine.tensor, engine.pipeline, engine.nodes)


def divided(layout: Layout, nodes: Sequence[Node]) -> Layout:
    """The layout with the number of nodes of an engine: if it is not given, the fewest whose GPUs hold it."""
    if layout.nodes is not None:
        return layout
    most = max((node.gpus for node in nodes), default=0) or layout.devices
    counts = node_counts(layout.tensor, layout.pipeline)
    return replace(layout, nodes=next(count for count in counts if layout.devices <= count * most))


def plan(layout: Layout, nodes: Sequence[Node]) -> list[tuple[Bundle, Node]]:
    """Place every bundle on a node. Raises PlacementError with the arithmetic if they do not fit.

    First fit, largest bundles first. If the bundles' sizes divide each other, as in real layouts, this finds
    a placement whenever there is one.
    """
    layout = divided(layout, nodes)
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
    return {node.id for bundle, node in placed if bundle.shares} <= first


def demand(layout: Layout, nodes: Sequence[Node]) -> tuple[int, int]:
    """Total GPUs and CPUs of the layout; 0 GPUs if no node has any."""
    bundles = _bundles(divided(layout, nodes), _on_gpus(nodes))
    return sum(bundle.gpus for bundle in bundles), sum(bundle.cpus for bundle in bundles)


def needs(layout: Layout, *, on_gpus: bool) -> str:
    """The needs of a layout that is `divided`, in words. Raises PlacementError if colocated engines outnumber
    the devices.
    """
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
    gpus = layout.share if on_gpus else 0
    return groups + [Bundle(range(0), range(i, i + 1), gpus) for i in range(layout.shares)]


def _shared(layout: Layout) -> list[Bundle]:
    """Bundles whose borders cross neither a group of the trainer nor a share of an engine."""
    share, devices = layout.share, layout.engines * layout.devices
    if devices > layout.ranks:
        keys, numbers = _engine_size(layout)
        raise PlacementError(
            f"placement = colocated: engine.count x {keys} = {layout.engines} x {numbers} = {devices} "
            f"devices, but trainer.parallel has {layout.ranks} ranks, one a device; an engine needs a rank "
            "on each of its devices (or placement = split)"
        )
    return [
        Bundle(
            part,
            range(min(part.start // share, layout.shares), min(part.stop // share, layout.shares)),
            len(part),
        )
        for part in _parts(layout.ranks, math.lcm(layout.group, share))
    ]


def _engine_size(layout: Layout) -> tuple[str, str]:
    """The keys that decide on an engine's devices, and their values."""
    if layout.pipeline == 1:
        return "engine.tensor", str(layout.tensor)
    return "engine.pipeline x engine.tensor", f"{layout.pipeline} x {layout.tensor}"


def _parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _needs(layout: Layout, bundles: Sequence[Bundle]) -> str:
    wanted: list[str] = []
    if layout.ranks:
        wanted.append(f"{layout.ranks} trainer ranks in groups of {layout.group} (trainer.parallel)")
    if layout.engines:
        keys, numbers = _engine_size(layout)
        over = f" on {layout.nodes} nodes each" if layout.shares > layout.engines else ""
        wanted.append(f"{layout.engines} engines of {numbers}{over} (engine.count, {keys})")
    gpus, cpus = sum(bundle.gpus for bundle in bundles), sum(bundle.cpus for bundle in bundles)
    need = f"{gpus} GPUs and {cpus} CPUs" if gpus else f"{cpus} CPUs"
    largest = max(bundle.gpus for bundle in bundles)
    together = f", {largest} of the GPUs on one node" if largest > 1 else ""
    return f"placement = {layout.placement}: {' and '.join(wanted)} need {need}{together}"
