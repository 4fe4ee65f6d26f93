"""Waits until a cluster has the devices that a layout needs."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from treepo.cluster.placement import Layout, Node, demand, plan
from treepo.errors import ClusterError, PlacementError

Look = Callable[[], Awaitable[Sequence[Node]]]
_REPEAT_SECONDS = 60.0  # between two equal lines


async def wait_for_devices(
    layout: Layout,
    nodes: int,
    look: Look,
    awaited: Callable[[Sequence[Node]], Sequence[str]],
    say: Callable[[str], None],
    *,
    seconds: float,
    may_grow: bool,
    pause: float = 1.0,
) -> None:
    """Return once at least `nodes` nodes have joined and hold the layout; say meanwhile what is missing.

    look: returns the nodes that have joined. awaited: given these nodes, names the missing ones. may_grow:
    whether more than `nodes` nodes may join; if not, a layout that does not fit into them is refused at once.
    pause: seconds between two calls of `look`.

    Raises PlacementError if the layout does not fit, and ClusterError if nodes are missing after `seconds`.
    """
    deadline = time.monotonic() + seconds
    said, repeat = "", 0.0
    while True:
        there = await look()
        refusal = None
        if len(there) >= nodes:
            try:
                plan(layout, there)
            except PlacementError as error:
                if not may_grow:
                    raise
                refusal = error
            else:
                return
        now, state = time.monotonic(), _state(layout, nodes, there, awaited(there))
        if now >= deadline:
            if refusal is not None:
                raise PlacementError(f"after {seconds:g} s: {refusal}")
            raise ClusterError(f"the run's devices are still missing after {seconds:g} s: {state}")
        if state != said or now >= repeat:
            say(state)
            said, repeat = state, now + _REPEAT_SECONDS
        await asyncio.sleep(pause)


def _state(layout: Layout, nodes: int, there: Sequence[Node], awaited: Sequence[str]) -> str:
    gpus, cpus = demand(layout, there)
    has = sum(node.gpus for node in there) if gpus else sum(node.cpus for node in there)
    devices = f"{has} of {gpus} GPUs" if gpus else f"{has} of {cpus} CPUs"
    waiting = f", waiting for {', '.join(awaited)}" if awaited else ""
    return f"{len(there)} of {max(nodes, len(there))} nodes, {devices}{waiting}"
