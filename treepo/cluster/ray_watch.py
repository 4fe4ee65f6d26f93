"""Notices within seconds that Ray itself has died, and keeps its library from ending this process.

Ray's library waits a minute for a lost GCS and then aborts the process with a dump. Here the death of the
GCS or of this node's raylet ends the run first, with one line, and ends what the dead Ray cannot end.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import grpc
import psutil
import ray
from ray._private.gcs_utils import create_gcs_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from treepo.data.daemon_thread import in_thread
from treepo.ending import end_within, skip_exit_handlers
from treepo.errors import ClusterError
from treepo.processes import how_ended

_log = logging.getLogger(__name__)
_PROCESSES = ("gcs_server", "raylet")
_LOOK_SECONDS = 2.0  # between two looks at the GCS, and at the processes below Ray's
_SILENT_SECONDS = 10.0  # of a GCS that answers no call
_END_SECONDS = 20.0  # from Ray's death until a clean-up that hangs in Ray's library is cut short
_LEAVE_SECONDS = 10.0  # for Ray's processes to end by themselves: a raylet waits a minute for a dead GCS
_lost: asyncio.Future[str] | None = None  # of the Ray that is watched: why it has died
_died = False  # a Ray that this process was connected to


@contextmanager
def keeping_signal_handlers() -> Iterator[Callable[[], None]]:
    """Keep this process's handler of SIGTERM, which `ray.init` replaces twice, in Python and in C++, and
    which `ray.shutdown` drops. Yields a function that sets it again before the end of the body.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    own, utils = signal.getsignal(signal.SIGTERM), ray._private.utils  # type: ignore[reportAttributeAccessIssue]
    of_ray, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None

    def keep() -> None:
        signal.signal(signal.SIGTERM, own)

    try:
        yield keep
    finally:
        utils.set_sigterm_handler = of_ray
        keep()


@asynccontextmanager
async def while_ray_lives(cluster: str | None) -> AsyncIterator[None]:
    """Cancel the body when Ray dies, and raise ClusterError in its place.

    cluster: HOST:PORT of the GCS of a running cluster that this process has joined; None if `ray.init` has
    started Ray here.
    """
    global _lost
    body = asyncio.current_task()
    assert body is not None
    lost = _lost = asyncio.get_running_loop().create_future()
    node: Any = ray._private.worker._global_node  # type: ignore[reportAttributeAccessIssue]

    def end(reason: str) -> None:
        global _died
        if lost.done():
            return
        _died = True
        lost.set_result(reason)
        _log.info("%s", reason)  # the command shows it as its error
        end_within(_END_SECONDS, lambda: f"error: {reason}", ClusterError.exit_code)
        if not body.cancelling():  # else the body ends already
            body.cancel()

    watches = [asyncio.create_task(_when_ended(name, pid, end)) for name, pid in _processes(node, cluster)]
    below = _Descendants(node) if cluster is None else None
    watches.append(asyncio.create_task(below.follow() if below else _when_silent(str(cluster), end)))
    try:
        yield
    except BaseException:
        if lost.done():
            body.uncancel()
            raise ClusterError(lost.result()) from None
        raise
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        if lost.done() and below is not None:
            below.kill()
        _lost = None


def shut_down_ray() -> None:
    """Disconnect from Ray, and end it if it was started here.

    The library would wait for a dead Ray, here and again when the interpreter ends: it is left as it is.
    """
    if _died:
        skip_exit_handlers()
        return
    node: Any = ray._private.worker._global_node  # type: ignore[reportAttributeAccessIssue]
    if node is None:
        return
    below, end_processes = _Descendants(node), node.kill_all_processes
    with keeping_signal_handlers() as keep:

        def end_with_handler(*arguments: Any, **options: Any) -> None:  # it takes a second
            keep()
            end_processes(*arguments, **options)

        node.kill_all_processes = end_with_handler
        ray.shutdown()
    below.kill(after=_LEAVE_SECONDS)


async def unless_lost[T](call: Awaitable[T]) -> T:
    """The result of a call of Ray. Raises ClusterError as soon as Ray is dead, when no call returns."""
    lost = _lost
    if lost is None:
        return await call
    answer = asyncio.ensure_future(call)
    try:
        await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
    finally:
        answer.cancel()
    raise ClusterError(lost.result())


def _processes(node: Any, cluster: str | None) -> list[tuple[str, int]]:
    """Names and ids of those of Ray's processes on this machine whose death ends the run."""
    if cluster is None:
        started = node.all_processes
        return [(name, info.process.pid) for name in _PROCESSES for info in started.get(name, ())]
    socket = f"--raylet_socket_name={node.raylet_socket_name}"
    raylets = [one for one in psutil.process_iter(["cmdline"]) if socket in (one.info["cmdline"] or ())]
    return [("raylet", raylet.pid) for raylet in raylets]


async def _when_ended(name: str, pid: int, end: Callable[[str], None]) -> None:
    """Call `end` once the process has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    with _descriptor(pid) as descriptor:
        if descriptor is not None:
            loop.add_reader(descriptor, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(descriptor)
    end(f"Ray's {name} (process {pid}) {how_ended(pid) or 'has ended'}, and no run goes on without it")


@contextmanager
def _descriptor(pid: int) -> Iterator[int | None]:
    """A descriptor that is readable once the process has ended; None if it is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def _when_silent(address: str, end: Callable[[str], None]) -> None:
    """Call `end` once the cluster's GCS has answered nothing for a while."""
    loop = asyncio.get_running_loop()
    answered = loop.time()
    channel: Any = create_gcs_channel(address, aio=True)
    request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[reportAttributeAccessIssue]  # generated code
    try:
        alive = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive
        while loop.time() - answered < _SILENT_SECONDS:
            with suppress(grpc.RpcError):
                await alive(request, timeout=_SILENT_SECONDS / 2)
                answered = loop.time()
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        await channel.close()
    end(
        f"the GCS of the Ray cluster at {address} has not answered for {_SILENT_SECONDS:g} s, and no run "
        "goes on without it"
    )


class _Descendants:
    """The processes below those of a Ray that was started here, which a dead raylet no longer ends."""

    def __init__(self, node: Any) -> None:
        self._roots = [info.process.pid for infos in node.all_processes.values() for info in infos]
        self._known = self._look()

    async def follow(self) -> None:
        """Look again and again: below a process that is dead nobody finds its children."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self._known = await in_thread(self._look)

    def kill(self, after: float = 0.0) -> None:
        """Give them `after` seconds to end by themselves, kill the rest, and wait until all are gone."""
        _, alive = psutil.wait_procs(self._known | self._look(), timeout=after)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_LOOK_SECONDS)

    def _look(self) -> set[psutil.Process]:
        found: set[psutil.Process] = set()
        for pid in self._roots:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                found |= {root, *root.children(recursive=True)}
        return found
