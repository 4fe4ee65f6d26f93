"""Reserves a run's devices in Ray, as `treepo.cluster.placement` places them."""

import asyncio
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from treepo.cluster.nodes import cluster_nodes, living_nodes
from treepo.cluster.placement import (
    Bundle,
    Layout,
    Node,
    divided,
    engines_layout,
    on_one_machine,
    plan,
    run_layout,
    shares_devices,
)
from treepo.cluster.process_environment import engine_environment, threads_of, trainer_environment
from treepo.config.engine import EngineConfig
from treepo.config.run import RunConfig
from treepo.errors import PlacementError
from treepo.watchdog import waiting

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Ray's options for a run's actors: one for each trainer rank, and one for each share of each engine.

    layout: its number of nodes of an engine is decided. shares_devices: whether the engines use the trainer's
    devices. one_machine: whether every engine is on the node of trainer rank 0. rank_nodes: Ray's id of each
    trainer rank's node.
    """

    layout: Layout
    shares_devices: bool
    one_machine: bool
    ranks: tuple[dict[str, Any], ...]
    engines: tuple[tuple[dict[str, Any], ...], ...]
    rank_nodes: tuple[str, ...]

    def engine_options(self, devices: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Ray's options for the actor of each share of each engine, with its devices if they are the
        trainer's.

        devices: Ray's name of each trainer rank's GPU on its node, in the order of ranks; used only if the
        devices are shared. Ray gives a GPU to its rank alone, because an actor can have a part of one GPU but
        not of several; so CUDA_VISIBLE_DEVICES names the share's GPUs. SGLang numbers the GPUs that it sees
        from 0.
        """
        if not self.shares_devices:
            return [list(shares) for shares in self.engines]
        parts = itertools.batched(devices, self.layout.share)
        return [
            [
                options | _environment(_variables(options) | {"CUDA_VISIBLE_DEVICES": ",".join(next(parts))})
                for options in shares
            ]
            for shares in self.engines
        ]


async def reserve(config: RunConfig, seconds: float) -> Reservation:
    """Hold the resources of the run's layout until the Ray session ends.

    Raises PlacementError at once if the cluster cannot hold the layout, and after `seconds` if the resources
    are still in use.
    """
    nodes = cluster_nodes()
    layout = divided(run_layout(config), nodes)
    placed = plan(layout, nodes)
    bundles = [bundle for bundle, _ in placed]
    for bundle, node in placed:
        _log.info("%s: %s", node.name, _members(bundle, layout))
    group = placement_group(
        [_resources(bundle) for bundle in bundles],
        bundle_label_selector=[{"ray.io/node-id": node.id} for _, node in placed],
    )
    try:
        with waiting("the run", lambda: f"devices: {_missing(bundles)}"):
            await asyncio.wait_for(group.ready(), seconds)
    except TimeoutError:
        raise PlacementError(
            f"the cluster has not had room for the run within {seconds:g} s: {_missing(bundles)}"
        ) from None
    shared, on_gpus = shares_devices(layout, nodes), any(node.gpus for node in nodes)
    ranks: list[dict[str, Any]] = [{}] * layout.ranks
    shares: list[dict[str, Any]] = [{}] * layout.shares
    rank_nodes = [""] * layout.ranks
    for index, (bundle, node) in enumerate(placed):
        options = {"num_cpus": 1, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, index)}
        rank_threads, engine_threads = _threads(node, placed)
        of_rank = options | _environment(trainer_environment(rank_threads, config, on_gpus=on_gpus))
        of_engine = options | _environment(engine_environment(engine_threads, on_gpus=on_gpus))
        for rank in bundle.ranks:
            ranks[rank] = of_rank | {"num_gpus": 1 if bundle.gpus else 0}
            rank_nodes[rank] = node.id
        for share in bundle.shares:
            shares[share] = of_engine | {"num_gpus": layout.share if bundle.gpus and not shared else 0}
    engines = tuple(itertools.batched(shares, layout.shares // layout.engines))
    one_machine = on_one_machine(placed)
    return Reservation(layout, shared, one_machine, tuple(ranks), engines, tuple(rank_nodes))


async def reserve_again(
    options: Sequence[dict[str, Any]], nodes: Sequence[str], seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Options and nodes of the trainer's ranks after some nodes may have left the cluster.

    Ranks on living nodes keep their reservation. The others get a new one, wherever the cluster has room,
    with ranks that were together on one node again. Raises PlacementError if there is none in time.

    An earlier reservation whose nodes have all left is removed first: Ray would give it the devices that are
    free, or come.
    """
    alive = living_nodes()
    bundles: dict[tuple[Any, int], list[int]] = {}
    earlier: dict[PlacementGroup, set[int]] = {}
    for rank, node in enumerate(nodes):
        if node not in alive:
            strategy = options[rank]["scheduling_strategy"]
            bundle = strategy.placement_group.id, strategy.placement_group_bundle_index
            bundles.setdefault(bundle, []).append(rank)
            earlier.setdefault(strategy.placement_group, set()).add(bundle[1])
    if not bundles:
        return list(options), list(nodes)
    groups = list(bundles.values())
    needs = [Bundle(range(len(ranks)), range(0), _gpus(options, ranks)) for ranks in groups]
    for ranks in groups:
        _log.warning("trainer ranks %s are placed again: their node has left", ranks)
    for lost, indices in earlier.items():
        if len(indices) == lost.bundle_count:
            remove_placement_group(lost)
    placements = await _placements(needs, seconds)
    options, nodes = list(options), list(nodes)
    for one, ranks in zip(placements, groups, strict=True):
        strategy = PlacementGroupSchedulingStrategy(one, 0)
        node = placement_group_table(one)["bundles_to_node_id"][0]
        for rank in ranks:
            options[rank] = options[rank] | {"scheduling_strategy": strategy}
            nodes[rank] = node
    return options, nodes


async def _placements(needs: Sequence[Bundle], seconds: float) -> list[PlacementGroup]:
    """A placement group for each bundle, so that every later loss of a node is that of whole groups."""
    placements = [placement_group([_resources(bundle)]) for bundle in needs]
    try:
        with waiting("the trainer", lambda: f"devices: {_missing(needs)}"):
            await asyncio.wait_for(asyncio.gather(*(one.ready() for one in placements)), seconds)
    except TimeoutError:
        for one in placements:
            remove_placement_group(one)
        raise PlacementError(
            f"a node has left, and the cluster has not had room for its trainer ranks within {seconds:g} s: "
            f"{_missing(needs)}"
        ) from None
    return placements


def unreserved_engines(config: EngineConfig) -> list[list[dict[str, Any]]]:
    """Ray's options for the shares of engines without a trainer: nothing is reserved, and Ray chooses their
    nodes.

    Raises PlacementError if the cluster cannot hold them.
    """
    nodes = cluster_nodes()
    layout, on_gpus = divided(engines_layout(config), nodes), any(node.gpus for node in nodes)
    placed = plan(layout, nodes)
    shares = [
        {"num_cpus": 1, "num_gpus": bundle.gpus}
        | _environment(engine_environment(_threads(node, placed)[1], on_gpus=on_gpus))
        for bundle, node in placed
    ]
    return [list(of_engine) for of_engine in itertools.batched(shares, layout.shares // layout.engines)]


def _threads(node: Node, placed: Sequence[tuple[Bundle, Node]]) -> tuple[int, int]:
    """CPU threads of each trainer rank and of each share of an engine on the node."""
    here = [bundle for bundle, at in placed if at.id == node.id]
    cores = node.cpus
    if node.id == ray.get_runtime_context().get_node_id():
        cores = min(cores, os.cpu_count() or 1)  # a Ray that the run starts may have more slots than cores
    ranks, shares = sum(len(bundle.ranks) for bundle in here), sum(len(bundle.shares) for bundle in here)
    return threads_of(node, cores, ranks), threads_of(node, cores, shares)


def _gpus(options: Sequence[dict[str, Any]], ranks: Sequence[int]) -> int:
    return sum(options[rank]["num_gpus"] for rank in ranks)


def _environment(variables: dict[str, str]) -> dict[str, Any]:
    return {"runtime_env": {"env_vars": variables}}


def _variables(options: Mapping[str, Any]) -> dict[str, str]:
    return options["runtime_env"]["env_vars"]


def _members(bundle: Bundle, layout: Layout) -> str:
    nodes = layout.shares // layout.engines
    numbers = [divmod(share, nodes) for share in bundle.shares]
    engines = [f"{engine} (share {share})" if nodes > 1 else engine for engine, share in numbers]
    lists = (("trainer ranks", bundle.ranks), ("engines", engines))
    return "; ".join(f"{name} {', '.join(map(str, numbers))}" for name, numbers in lists if numbers)


def _resources(bundle: Bundle) -> dict[str, float]:
    gpus = {"GPU": float(bundle.gpus)} if bundle.gpus else {}
    return {"CPU": float(bundle.cpus)} | gpus


def _missing(bundles: Sequence[Bundle]) -> str:
    free = ray.available_resources()
    needed = {"GPU": sum(bundle.gpus for bundle in bundles), "CPU": sum(bundle.cpus for bundle in bundles)}
    return ", ".join(
        f"{count} {name}s are needed and {free.get(name, 0):g} are free in all"
        for name, count in needed.items()
        if count
    )
