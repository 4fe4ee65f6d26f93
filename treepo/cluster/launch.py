"""A training run on the nodes of an allocation, or on a Ray cluster that is there: `treepo launch`.

The head (rank 0) checks the configuration and its data, starts Ray, waits until the devices that the run
needs are there, and submits `treepo train` as a job of Ray. The other nodes join and end with the head, with
its exit code. Configuration, code, model, data and run folder are on a filesystem that all nodes share:
nothing is uploaded.
"""

import asyncio
import hashlib
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from treepo.cluster.allocation import Cluster
from treepo.cluster.placement import Node
from treepo.cluster.ray_node import RayNode, Slots, free_ports, new_secrets, ray_head, ray_worker
from treepo.cluster.rendezvous import Gathering, RayAddress, gather, join, own_address
from treepo.cluster.schedulers import Allocation
from treepo.cluster.wait_for_devices import wait_for_devices
from treepo.config.load import dump_config
from treepo.config.run import RunConfig
from treepo.errors import EXIT_INTERRUPTED, ClusterError, TreepoError

EXIT_TERMINATED = 143
_FAREWELL_SECONDS = 120.0  # in which an interrupted head says how it ended; the training's clean-up included
_START_SECONDS = 180.0  # for Ray's head on this machine
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Launch:
    """What is launched, and how.

    arguments: of `treepo train`. check: what the head checks before anything starts. wait: seconds in which
    all devices must have come. slots: of this node. dashboard_port: a free one where None. say: shows a line.
    write: shows what the job says.
    """

    config: RunConfig
    arguments: Sequence[str]
    check: Callable[[], None]
    wait: float
    slots: Slots
    dashboard_port: int | None
    say: Callable[[str], None]
    write: Callable[[str], None]

    def fingerprint(self) -> str:
        """The same on all nodes that launch the same."""
        text = "\0".join([dump_config(self.config), *self.arguments])
        return hashlib.sha256(text.encode()).hexdigest()

    def command(self) -> str:
        """For a shell of the head."""
        program = [sys.executable, "-c", "from treepo.cli.main import main; main()", "train", *self.arguments]
        return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(program)}"


async def launch(where: Allocation | Cluster, order: Launch) -> int:
    """The exit code of the training, on every node. Raises TreepoError where it did not come to training.

    SIGTERM ends it as Ctrl-C does: first the training, in its own way, then what was started for it.
    """
    loop, terminated = asyncio.get_running_loop(), asyncio.Event()
    task = asyncio.ensure_future(_launch(where, order, terminated))

    def terminate() -> None:
        terminated.set()
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await task
    except asyncio.CancelledError:
        if terminated.is_set():
            return EXIT_TERMINATED
        raise


async def _launch(where: Allocation | Cluster, order: Launch, terminated: asyncio.Event) -> int:
    if isinstance(where, Cluster):
        return await _use(where, order)
    if where.rank > 0:
        return await _join(where, order)
    return await _lead(where, order, terminated)


async def _use(cluster: Cluster, order: Launch) -> int:
    """Train on a cluster that is there."""
    await asyncio.to_thread(order.check)
    return await _train(order, None, cluster.nodes, lambda _: (), may_grow=True)


async def _lead(allocation: Allocation, order: Launch, terminated: asyncio.Event) -> int:
    """Rank 0: the other nodes learn how it ended, and have left, before Ray's head is stopped."""
    alone = allocation.nodes == 1
    host = _LOOPBACK if alone else own_address(allocation)
    async with AsyncExitStack() as stack:

        def lost(rank: int) -> None:
            order.say(f"{allocation.name(rank)} is gone")

        gathering = Gathering(1, "", lost)
        if not alone:
            gathering = await stack.enter_async_context(gather(allocation, host, order.fingerprint(), lost))
        exit_code = 1  # of an error that nobody foresaw
        try:
            await asyncio.to_thread(order.check)
            exit_code = await _start_and_train(allocation, host, gathering, order, stack)
        except asyncio.CancelledError:
            exit_code = EXIT_TERMINATED if terminated.is_set() else EXIT_INTERRUPTED
            raise
        except TreepoError as error:
            exit_code = error.exit_code
            raise
        finally:
            await gathering.end(exit_code)
        return exit_code


async def _start_and_train(
    allocation: Allocation, host: str, gathering: Gathering, order: Launch, stack: AsyncExitStack
) -> int:
    port, dashboard_port = free_ports(2)
    dashboard_port = order.dashboard_port or dashboard_port
    secrets = new_secrets(os.environ)
    _open_ray(secrets)
    slots = _enough_slots(order) if allocation.nodes == 1 else order.slots
    node = await stack.enter_async_context(ray_head(host, port, dashboard_port, slots, secrets))
    url = f"http://{_LOOPBACK}:{dashboard_port}"
    order.say(f"starts Ray; its dashboard is at {url}")

    def awaited(there: Sequence[Node]) -> list[str]:
        names = {one.name for one in there}
        connected = {0: host} | gathering.here
        coming = [rank for rank, address in sorted(connected.items()) if address not in names]
        return [allocation.name(rank) for rank in gathering.missing()] + [
            f"Ray on {allocation.name(rank)}" for rank in coming
        ]

    async def train() -> int:
        return await _train(
            order,
            url,
            allocation.nodes,
            awaited,
            up=lambda: gathering.announce(RayAddress(f"{host}:{port}", secrets)),
        )

    return await _unless_ended(node, train())


async def _train(
    order: Launch,
    url: str | None,
    nodes: int,
    awaited: Callable[[Sequence[Node]], Sequence[str]],
    *,
    up: Callable[[], None] | None = None,
    may_grow: bool = False,
) -> int:
    """url: the job server's; None: that of RAY_ADDRESS. up: called once Ray is there."""
    # Ray reads when it is imported who may use the cluster.
    from treepo.cluster.placement import run_layout
    from treepo.cluster.ray_job import job_server

    server = await job_server(url, order.wait if url is None else _START_SECONDS)
    if up is not None:
        up()
    layout = run_layout(order.config)
    await wait_for_devices(
        layout, nodes, server.nodes, awaited, order.say, seconds=order.wait, may_grow=may_grow
    )
    order.say("all devices are there; the training begins")
    return await server.run(order.command(), order.write)


async def _join(allocation: Allocation, order: Launch) -> int:
    """Another rank: a part of the cluster until the head says how it ended."""
    order.say(f"looking for the head at {allocation.head}:{allocation.port}")
    connection = await join(allocation, order.fingerprint(), order.wait)
    try:
        news = await connection.next()
        if isinstance(news, int):
            order.say(f"the head ended with exit code {news} before anything began; its output says why")
            return news
        async with ray_worker(connection.host, news.address, order.slots, news.secrets) as node:
            order.say(f"joins Ray at {news.address} as {connection.host}")
            outcome = await _unless_ended(node, connection.next(), order.say)
    finally:
        connection.close()
    assert isinstance(outcome, int)
    order.say(f"the head has ended with exit code {outcome}")
    return outcome


async def _unless_ended[T](node: RayNode, work: Awaitable[T], say: Callable[[str], None] | None = None) -> T:
    """What `work` comes to. Raises ClusterError where Ray on this node ends first.

    say: on a node that the head says farewell to: it is waited for where this is cancelled.
    """
    working, ended = asyncio.ensure_future(work), asyncio.ensure_future(node.ended())
    try:
        await asyncio.wait((working, ended), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClusterError(f"Ray on this node: {ended.result()}")
    except asyncio.CancelledError:
        if say is not None:
            say(
                f"waits up to {_FAREWELL_SECONDS:g} s for the head to end the training; this node alone ends "
                "nothing"
            )
            await asyncio.wait(
                (working, ended), timeout=_FAREWELL_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        raise
    finally:
        working.cancel()
        ended.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)


def _open_ray(secrets: Mapping[str, str]) -> None:
    """Let this process use the cluster that it starts, and look for no other."""
    os.environ.update(secrets)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    beside = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{beside},{_LOOPBACK}" if beside else _LOOPBACK


def _enough_slots(order: Launch) -> Slots:
    """Of one node alone: as `treepo train` by itself, it has a place for every rank and engine."""
    places = order.config.trainer.parallel.ranks + order.config.engine.count
    cpus = max(places, os.cpu_count() or 1) if order.slots.cpus is None else order.slots.cpus
    return Slots(cpus, order.slots.gpus)
