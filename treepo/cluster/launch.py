"""`treepo launch`: train on the nodes of an allocation, or on a Ray cluster that already runs.

The head (rank 0) checks the configuration and its data, starts Ray, waits for the devices that the run needs,
and submits `treepo train` as a Ray job. The other nodes join Ray, and end when the head ends, with its exit
code. Nothing is uploaded: all nodes share a filesystem with the configuration, code, model, data and run
folder.
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
from treepo.cluster.ray_node import NodeResources, RayNode, free_ports, new_secrets, ray_head, ray_worker
from treepo.cluster.rendezvous import RayAddress, Rendezvous, join, open_rendezvous, own_address
from treepo.cluster.schedulers import Allocation
from treepo.cluster.wait_for_devices import wait_for_devices
from treepo.config.load import dump_config
from treepo.config.run import RunConfig
from treepo.errors import EXIT_INTERRUPTED, ClusterError, TreepoError

EXIT_TERMINATED = 143
_FAREWELL_SECONDS = 120.0  # for an interrupted head to clean up its training and send the exit code
_START_SECONDS = 180.0  # for Ray's head to start on this machine
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Launch:
    """What to launch, and how.

    arguments: of `treepo train`. check: called on the head before anything starts; raises TreepoError. wait:
    seconds for all devices to appear. resources: that this node offers. dashboard_port: None picks a free
    one. say: shows a line. write: shows the job's output.
    """

    config: RunConfig
    arguments: Sequence[str]
    check: Callable[[], None]
    wait: float
    resources: NodeResources
    dashboard_port: int | None
    say: Callable[[str], None]
    write: Callable[[str], None]

    def fingerprint(self) -> str:
        """A hash of configuration and arguments: equal on all nodes of one launch."""
        text = "\0".join([dump_config(self.config), *self.arguments])
        return hashlib.sha256(text.encode()).hexdigest()

    def command(self) -> str:
        """The training's command line, for a shell on the head."""
        program = [sys.executable, "-c", "from treepo.cli.main import main; main()", "train", *self.arguments]
        # Ray's job supervisor sets it to 1 if the cluster's environment does not have it.
        threads = os.environ.get("OMP_NUM_THREADS")
        setting = (
            "unset OMP_NUM_THREADS" if threads is None else f"export OMP_NUM_THREADS={shlex.quote(threads)}"
        )
        return f"cd {shlex.quote(os.getcwd())} && {setting} && exec {shlex.join(program)}"


async def launch(target: Allocation | Cluster, spec: Launch) -> int:
    """Train, and return the training's exit code on every node.

    Raises TreepoError if the training did not start. SIGTERM and Ctrl-C end the training first, which cleans
    up after itself, and then the processes that were started for it.
    """
    loop, terminated = asyncio.get_running_loop(), asyncio.Event()
    task = asyncio.ensure_future(_launch(target, spec, terminated))

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


async def _launch(target: Allocation | Cluster, spec: Launch, terminated: asyncio.Event) -> int:
    if isinstance(target, Cluster):
        return await _use(target, spec)
    if target.rank > 0:
        return await _join(target, spec)
    return await _lead(target, spec, terminated)


async def _use(cluster: Cluster, spec: Launch) -> int:
    """Train on a cluster that already runs."""
    from treepo.cluster.ray_address import check_job_server

    await asyncio.to_thread(check_job_server, cluster.address)
    await asyncio.to_thread(spec.check)
    return await _train(spec, None, cluster.nodes, lambda _: (), may_grow=True)


async def _lead(allocation: Allocation, spec: Launch, terminated: asyncio.Event) -> int:
    """Rank 0: train, send the exit code to the other nodes, and stop Ray's head once they have left."""
    alone = allocation.nodes == 1
    host = _LOOPBACK if alone else own_address(allocation)
    async with AsyncExitStack() as stack:

        def lost(rank: int) -> None:
            spec.say(f"{allocation.name(rank)} is gone")

        rendezvous = Rendezvous(1, "", lost)
        if not alone:
            rendezvous = await stack.enter_async_context(
                open_rendezvous(allocation, host, spec.fingerprint(), lost)
            )
        exit_code = 1  # of any error but a TreepoError
        try:
            await asyncio.to_thread(spec.check)
            exit_code = await _start_and_train(allocation, host, rendezvous, spec, stack)
        except asyncio.CancelledError:
            exit_code = EXIT_TERMINATED if terminated.is_set() else EXIT_INTERRUPTED
            raise
        except TreepoError as error:
            exit_code = error.exit_code
            raise
        finally:
            await rendezvous.end(exit_code)
        return exit_code


async def _start_and_train(
    allocation: Allocation, host: str, rendezvous: Rendezvous, spec: Launch, stack: AsyncExitStack
) -> int:
    port, dashboard_port = free_ports(2)
    dashboard_port = spec.dashboard_port or dashboard_port
    secrets = new_secrets(os.environ)
    _open_ray(secrets)
    resources = _enough_cpus(spec) if allocation.nodes == 1 else spec.resources
    node = await stack.enter_async_context(ray_head(host, port, dashboard_port, resources, secrets))
    url = f"http://{_LOOPBACK}:{dashboard_port}"
    spec.say(f"starts Ray; its dashboard is at {url}")

    def awaited(there: Sequence[Node]) -> list[str]:
        names = {node.name for node in there}
        connected = {0: host} | rendezvous.connected
        without_ray = [rank for rank, address in sorted(connected.items()) if address not in names]
        return [allocation.name(rank) for rank in rendezvous.missing()] + [
            f"Ray on {allocation.name(rank)}" for rank in without_ray
        ]

    async def train() -> int:
        return await _train(
            spec,
            url,
            allocation.nodes,
            awaited,
            ray_is_up=lambda: rendezvous.announce(RayAddress(f"{host}:{port}", secrets)),
        )

    return await _unless_ended(node, train())


async def _train(
    spec: Launch,
    url: str | None,
    nodes: int,
    awaited: Callable[[Sequence[Node]], Sequence[str]],
    *,
    ray_is_up: Callable[[], None] | None = None,
    may_grow: bool = False,
) -> int:
    """Submit the training once the devices are there, and return its exit code.

    url: of the job server; None takes that of RAY_ADDRESS. ray_is_up: called once Ray answers.
    """
    # Ray reads the secrets of the cluster from the environment when it is imported.
    from treepo.cluster.placement import run_layout
    from treepo.cluster.ray_job import job_server

    server = await job_server(url, spec.wait if url is None else _START_SECONDS)
    if ray_is_up is not None:
        ray_is_up()
    layout = run_layout(spec.config)
    await wait_for_devices(
        layout, nodes, server.nodes, awaited, spec.say, seconds=spec.wait, may_grow=may_grow
    )
    spec.say("all devices are there; the training begins")
    return await server.run(spec.command(), spec.write)


async def _join(allocation: Allocation, spec: Launch) -> int:
    """Another rank: take part in the cluster until the head sends the exit code."""
    spec.say(f"looking for the head at {allocation.head}:{allocation.port}")
    connection = await join(allocation, spec.fingerprint(), spec.wait)
    try:
        news = await connection.next()
        if isinstance(news, int):
            spec.say(f"the head ended with exit code {news} before anything began; its output says why")
            return news
        async with ray_worker(connection.host, news.address, spec.resources, news.secrets) as node:
            spec.say(f"joins Ray at {news.address} as {connection.host}")
            outcome = await _unless_ended(node, connection.next(), spec.say)
    finally:
        connection.close()
    assert isinstance(outcome, int)
    spec.say(f"the head has ended with exit code {outcome}")
    return outcome


async def _unless_ended[T](node: RayNode, work: Awaitable[T], say: Callable[[str], None] | None = None) -> T:
    """The result of `work`. Raises ClusterError if Ray on this node ends first.

    say: given on a node that waits for the head's exit code. If cancelled, this node says so and waits a
    while longer.
    """
    working, ended = asyncio.ensure_future(work), asyncio.ensure_future(node.ended())
    try:
        await asyncio.wait((working, ended), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClusterError(f"Ray on this node: {ended.result()}")
    except asyncio.CancelledError:
        if say is not None:
            say(f"waits up to {_FAREWELL_SECONDS:g} s for the head to end the training: only the head can")
            await asyncio.wait(
                (working, ended), timeout=_FAREWELL_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        raise
    finally:
        working.cancel()
        ended.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)


def _open_ray(secrets: Mapping[str, str]) -> None:
    """Give this process access to the cluster that it starts, and to no other cluster."""
    os.environ.update(secrets)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{others},{_LOOPBACK}" if others else _LOOPBACK


def _enough_cpus(spec: Launch) -> NodeResources:
    """The resources of a single node, with a CPU for every rank and engine as in `treepo train`."""
    actors = spec.config.trainer.parallel.ranks + spec.config.engine.count
    cpus = max(actors, os.cpu_count() or 1) if spec.resources.cpus is None else spec.resources.cpus
    return NodeResources(cpus, spec.resources.gpus)
