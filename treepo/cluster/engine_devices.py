"""The devices of each engine: those that the run has reserved, or others once their node has left the
cluster.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from treepo.cluster.nodes import living_nodes
from treepo.data.daemon_thread import in_thread
from treepo.errors import PlacementError
from treepo.watchdog import waiting

_LOOK_SECONDS = 5.0
_log = logging.getLogger(__name__)


class EngineDevices:
    """Chooses the nodes on which the actors of each engine start, one actor for each share.

    options: Ray's options for the actors of each engine; an engine that moves gets others. may_move: false if
    an engine cannot leave the trainer, because it uses the trainer's devices or its machine's memory.
    seconds: how long an engine may wait for devices (`engine.rejoin_seconds`).
    """

    def __init__(
        self, options: Sequence[Sequence[dict[str, Any]]], *, may_move: bool, seconds: float
    ) -> None:
        self.options = [list(shares) for shares in options]
        self._reserved = [[(each, _reserved_node(each)) for each in shares] for shares in options]
        self._nodes = [[node for _, node in shares] for shares in self._reserved]
        self._may_move, self._seconds = may_move, seconds
        self._groups: dict[int, PlacementGroup] = {}  # of engines that have moved

    async def find(self, index: int) -> None:
        """Return once the engine can be started.

        That is at once if all its shares have reserved devices on living nodes. Otherwise it waits for nodes
        with free devices for the others: the same that have come back, some that replace them, or others.
        Raises PlacementError if there are none within `seconds`, and at once if the engine may not move.
        """
        if await self._has_nodes(index):
            return
        if not self._may_move:
            raise PlacementError("its node has left the cluster, and it cannot leave the trainer's devices")
        if any(self._nodes[index]):
            _log.warning(
                "the node of engine %d has left the cluster; it waits up to %g s", index, self._seconds
            )
        try:
            async with asyncio.timeout(self._seconds):
                await self._move(index)
        except TimeoutError:
            raise PlacementError(
                f"no node has had free devices for it within {self._seconds:g} s (engine.rejoin_seconds)"
            ) from None

    async def lost(self, index: int) -> None:
        """Return once a node of the engine's devices has left the cluster."""
        while None in self._nodes[index] or await self._has_nodes(index):
            await asyncio.sleep(_LOOK_SECONDS)

    async def _has_nodes(self, index: int) -> bool:
        return set(self._nodes[index]) <= set(await in_thread(living_nodes))

    async def _move(self, index: int) -> None:
        """Shares that the run has reserved on living nodes stay there; the others get a common group."""
        # First of all: Ray would give the node that comes to the earlier group, which nobody uses.
        if (earlier := self._groups.pop(index, None)) is not None:
            remove_placement_group(earlier)
        alive, shares, before = await in_thread(living_nodes), self._reserved[index], self._nodes[index]
        moving = [share for share, (_, node) in enumerate(shares) if node not in alive]
        group = placement_group([_needs(shares[share][0]) for share in moving])
        try:
            with waiting(f"engine {index}", "a node with free devices"):
                await group.ready()
        except BaseException:
            remove_placement_group(group)
            raise
        self._groups[index] = group
        self.options[index], self._nodes[index] = map(list, zip(*shares, strict=True))
        for bundle, share in enumerate(moving):
            strategy = PlacementGroupSchedulingStrategy(group, bundle)
            moved = self.options[index][share] | {"scheduling_strategy": strategy}
            self.options[index][share], self._nodes[index][share] = moved, _reserved_node(moved)
        if gone := [node for node in self._nodes[index] if node not in before]:
            _log.warning("engine %d moves to %s", index, ", ".join(map(_address, gone)))


def _needs(options: dict[str, Any]) -> dict[str, float]:
    needs = {"CPU": float(options["num_cpus"]), "GPU": float(options["num_gpus"])}
    return {name: count for name, count in needs.items() if count}


def _reserved_node(options: dict[str, Any]) -> str | None:
    """The id of the node that holds the reservation; None if Ray chooses the node."""
    strategy = options.get("scheduling_strategy")
    if strategy is None:
        return None
    bundles = placement_group_table(strategy.placement_group)["bundles_to_node_id"]
    return bundles[strategy.placement_group_bundle_index]


def _address(node_id: str | None) -> str:
    return next((node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id), "a node")
