"""A node of a launch other than the head: it runs Ray for the head until the head says how the launch ended.

It comes back from whatever can be repaired: if its own Ray ends, it starts another; if the head starts
another Ray, it joins that one; if the head is gone, it ends its Ray and waits for a head that is started
again, as long as at the start (`--wait`). With `--max-restarts 0` each of these ends it.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from treepo.cluster.join import Connection, LostHeadError, NewRay, join
from treepo.cluster.launch_parts import Launch, first_of
from treepo.cluster.ray_node import RayNode
from treepo.cluster.restarts import pause_seconds
from treepo.cluster.schedulers import Allocation
from treepo.errors import ClusterError

StartRay = Callable[[Connection, str], AbstractAsyncContextManager[RayNode]]
"""Runs this node's Ray, given the connection to the head and the address of the head's Ray."""

_SOUND_SECONDS = 600.0  # after which a Ray that ends is no failure to start


async def take_part(allocation: Allocation, spec: Launch, start: StartRay) -> int:
    """Return the exit code that the head sends.

    Raises ClusterError if no head comes within `--wait`, or Ray on this node cannot be kept running, and
    AllocationError if the head refuses this node.
    """
    while True:
        spec.say(f"looking for the head at {allocation.head}:{allocation.port}")
        connection = await join(allocation, spec.fingerprint(), spec.config.out, spec.wait)
        try:
            return await _follow(connection, spec, start)
        except LostHeadError as error:
            if not spec.max_restarts:
                raise
            spec.say(f"{error}; waits up to {spec.wait:g} s for it to be started again")
        finally:
            connection.close()


async def _follow(connection: Connection, spec: Launch, start: StartRay) -> int:
    """Do what the head says until it sends the exit code."""
    news, began = await connection.next(), False
    while isinstance(news, NewRay):
        began = True
        if news.address is None:
            spec.say("the head starts Ray again")
            news = await connection.next()
        else:
            news = await _run_ray(connection, news.address, spec, start)
    before = "" if began else " before anything began; its output says why"
    spec.say(f"the head {'has ' if began else ''}ended with exit code {news}{before}")
    return news


async def _run_ray(connection: Connection, address: str, spec: Launch, start: StartRay) -> NewRay | int:
    """Keep Ray running on this node until the head has news."""
    news, failures = asyncio.ensure_future(connection.next()), 0
    loop = asyncio.get_running_loop()
    try:
        while True:
            begun = loop.time()
            async with start(connection, address) as node:
                spec.say(f"joins Ray at {address} as {connection.host}")
                reason = await first_of(news, node)
            if reason is None:
                return news.result()
            failures = 1 if loop.time() - begun > _SOUND_SECONDS else failures + 1
            if failures > spec.max_restarts:
                raise ClusterError(f"Ray on this node: {reason}")
            pause = pause_seconds(failures)
            spec.say(f"Ray on this node: {reason}; restart {failures} of {spec.max_restarts} in {pause:g} s")
            await asyncio.wait((news,), timeout=pause)
            if news.done():
                return news.result()
    finally:
        news.cancel()
        await asyncio.gather(news, return_exceptions=True)
