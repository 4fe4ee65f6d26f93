"""`treepo launch`: train on the nodes of an allocation, or on a Ray cluster that already runs.

The head (rank 0) checks the configuration and its data, starts Ray, waits for the devices that the run needs,
and submits `treepo train` as a Ray job. The other nodes join Ray, and end when the head ends, with its exit
code (treepo.cluster.worker_node). Nothing is uploaded: all nodes share a filesystem with the configuration,
code, model, data and run folder.

If the training crashes or Ray does, the head ends everything that is left of it, starts another Ray, waits
for the devices again and continues from the newest checkpoint (treepo.cluster.restarts). In a cluster that
already runs, the job alone is started again.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from treepo.cluster.allocation import Cluster
from treepo.cluster.launch_key import LaunchKey, remove_old_keys, shared_key
from treepo.cluster.launch_parts import Launch, unless_ended
from treepo.cluster.placement import Node
from treepo.cluster.ray_node import NodeResources, free_ports, new_secrets, ray_head, ray_worker
from treepo.cluster.rendezvous import Rendezvous, open_rendezvous, own_address
from treepo.cluster.restarts import Saved, newest_saved, wait_until_free, with_restarts
from treepo.cluster.schedulers import Allocation
from treepo.cluster.wait_for_devices import wait_for_devices
from treepo.cluster.worker_node import take_part
from treepo.data.daemon_thread import in_thread
from treepo.errors import ClusterError, LostJobError, StoppedJobError, TreepoError

if TYPE_CHECKING:
    from treepo.cluster.ray_job import JobServer

_START_SECONDS = 180.0  # for Ray's head to start on this machine
_LOOPBACK = "127.0.0.1"


async def launch(target: Allocation | Cluster, spec: Launch) -> int:
    """Train, and return the training's exit code on every node.

    Raises TreepoError if the training did not start. If cancelled, it ends the training first, which cleans
    up after itself, and then the processes that were started for it.
    """
    if isinstance(target, Cluster):
        return await _use(target, spec)
    if target.rank > 0:
        return await take_part(
            target,
            spec,
            lambda head, address: ray_worker(head.host, address, spec.resources, head.secrets),
        )
    return await _lead(target, spec)


async def _use(cluster: Cluster, spec: Launch) -> int:
    """Train on a cluster that already runs."""
    from treepo.cluster.ray_address import check_job_server
    from treepo.cluster.ray_job import job_server

    await in_thread(lambda: check_job_server(cluster.address))
    await in_thread(spec.check)
    last: JobServer | None = None  # of the attempt before

    async def attempt(resume: bool) -> int:
        nonlocal last
        try:
            if last is not None:
                await last.end_job()
                await wait_until_free(spec.config.out)
            server = await job_server(None, spec.wait)
            await _wait_for_devices(server, spec, cluster.nodes, lambda _: (), may_grow=True)
            last = server
            return await server.run(spec.command(resume=resume), spec.write)
        except ClusterError as error:
            raise _as_crash(error, began=last is not None) from None

    return await _restarted(attempt, spec)


async def _lead(allocation: Allocation, spec: Launch) -> int:
    """Rank 0: train, send the exit code to the other nodes, and stop Ray's head once they have left."""
    secrets = new_secrets(os.environ)
    async with AsyncExitStack() as stack:
        if allocation.nodes == 1:
            head = _Head(allocation, _LOOPBACK, spec, LaunchKey("", "", secrets))
        else:
            head = await _open_head(allocation, spec, secrets, stack)
        stack.push_async_exit(head.ray)
        exit_code = 1  # of any error but a TreepoError
        training = asyncio.ensure_future(_check_and_train(head, spec))
        try:
            exit_code = await asyncio.shield(training)
        except asyncio.CancelledError:
            exit_code = spec.interrupted()
            head.rendezvous.warn(exit_code)
            training.cancel()
            await training
            raise
        except TreepoError as error:
            exit_code = error.exit_code
            raise
        finally:
            await head.rendezvous.end(exit_code)
        return exit_code


async def _check_and_train(head: "_Head", spec: Launch) -> int:
    await in_thread(spec.check)
    remove_old_keys(spec.config.out, head.key)
    return await _restarted(head.attempt, spec)


async def _open_head(
    allocation: Allocation, spec: Launch, secrets: Mapping[str, str], stack: AsyncExitStack
) -> "_Head":
    """A head that the other nodes can find."""
    host = own_address(allocation)
    head = _Head(allocation, host, spec, stack.enter_context(shared_key(spec.config.out, secrets)))
    server = open_rendezvous(allocation, host, head.rendezvous)
    await stack.enter_async_context(server)
    return head


class _Head:
    """Rank 0 with its Ray, which it starts anew for each attempt to train.

    host: the address at which the other nodes reach it. ray: what is to be closed at the end.
    """

    def __init__(self, allocation: Allocation, host: str, spec: Launch, key: LaunchKey) -> None:
        self._allocation, self._host, self._spec, self.key = allocation, host, spec, key
        self.rendezvous = Rendezvous(allocation.nodes, spec.fingerprint(), key, self._say_change)
        self.ray = AsyncExitStack()
        self._began = False  # whether the training has been submitted once

    def _say_change(self, rank: int, joined: bool) -> None:
        name = self._allocation.name(rank)
        if not joined:
            self._spec.say(f"{name} is gone; the run goes on if it can, and the node may come back")
        elif self._began:
            self._spec.say(f"{name} is back")

    async def attempt(self, resume: bool) -> int:
        """Train once, in a Ray of its own. Raises what `_as_crash` says."""
        if self._began:
            self.rendezvous.announce(None)
            await _uninterrupted(self.ray.aclose())
            await wait_until_free(self._spec.config.out)
        try:
            return await self._start_and_train(resume)
        except ClusterError as error:
            raise _as_crash(error, began=self._began) from None

    async def _start_and_train(self, resume: bool) -> int:
        port, dashboard_port = free_ports(2)
        dashboard_port = self._spec.dashboard_port or dashboard_port
        _open_ray(self.key.secrets)
        alone = self._allocation.nodes == 1
        resources = _enough_cpus(self._spec) if alone else self._spec.resources
        node = await self.ray.enter_async_context(
            ray_head(self._host, port, dashboard_port, resources, self.key.secrets)
        )
        url = f"http://{_LOOPBACK}:{dashboard_port}"
        self._spec.say(f"starts Ray; its dashboard is at {url}")
        return await unless_ended(node, self._train(url, f"{self._host}:{port}", resume))

    async def _train(self, url: str, ray_address: str, resume: bool) -> int:
        # Ray reads the secrets of the cluster from the environment when it is imported.
        from treepo.cluster.ray_job import job_server

        spec = self._spec
        server = await job_server(url, _START_SECONDS)
        self.rendezvous.announce(ray_address)
        await _wait_for_devices(server, spec, self._allocation.nodes, self._awaited, may_grow=False)
        self._began = True
        return await server.run(spec.command(resume=resume), spec.write)

    def _awaited(self, there: Sequence[Node]) -> list[str]:
        """Names what is missing of the launch's nodes while `there` have joined Ray."""
        names = {node.name for node in there}
        connected = {0: self._host} | self.rendezvous.connected
        without_ray = [rank for rank, address in sorted(connected.items()) if address not in names]
        name = self._allocation.name
        return [name(rank) for rank in self.rendezvous.missing()] + [
            f"Ray on {name(rank)}" for rank in without_ray
        ]


def _as_crash(error: ClusterError, *, began: bool) -> ClusterError:
    """The error, as one that a restart follows if the first training has begun and nobody has stopped it."""
    return LostJobError(str(error)) if began and not isinstance(error, StoppedJobError) else error


async def _wait_for_devices(
    server: "JobServer",
    spec: Launch,
    nodes: int,
    awaited: Callable[[Sequence[Node]], Sequence[str]],
    *,
    may_grow: bool,
) -> None:
    from treepo.cluster.placement import run_layout

    layout = run_layout(spec.config)
    await wait_for_devices(
        layout, nodes, server.nodes, awaited, spec.say, seconds=spec.wait, may_grow=may_grow
    )
    spec.say("all devices are there; the training begins")


async def _restarted(attempt: Callable[[bool], Awaitable[int]], spec: Launch) -> int:
    async def saved() -> Saved | None:
        return await in_thread(lambda: newest_saved(spec.config.out))

    return await with_restarts(attempt, saved, spec.say, most=spec.max_restarts, resume=spec.resume)


async def _uninterrupted(work: Coroutine[Any, Any, object]) -> None:
    """Finish the work even if this task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _open_ray(secrets: Mapping[str, str]) -> None:
    """Give this process access to the cluster that it starts, and to no other cluster."""
    os.environ.update(secrets)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    if others is None or _LOOPBACK not in others.split(","):
        os.environ["no_proxy"] = f"{others},{_LOOPBACK}" if others else _LOOPBACK


def _enough_cpus(spec: Launch) -> NodeResources:
    """The resources of a single node, with a CPU for every rank and engine as in `treepo train`."""
    actors = spec.config.trainer.parallel.ranks + spec.config.engine.count
    cpus = max(actors, os.cpu_count() or 1) if spec.resources.cpus is None else spec.resources.cpus
    return NodeResources(cpus, spec.resources.gpus)
