"""What a launch is, and what the head and the other nodes have in common."""

import asyncio
import hashlib
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from treepo.cluster.ray_node import NodeResources, RayNode
from treepo.config.load import dump_config
from treepo.config.run import RunConfig
from treepo.errors import ClusterError

_FAREWELL_SECONDS = 50.0  # for a head that was interrupted too to end its training and send the exit code


@dataclass(frozen=True, slots=True)
class Launch:
    """What to launch, and how.

    arguments: of `treepo train`, without --resume. resume: whether the first start has it. check: called on
    the head before anything starts; raises TreepoError. wait: seconds for all devices to appear.
    max_restarts: of the training without a new checkpoint; and of Ray on a node other than the head.
    resources: that this node offers. dashboard_port: None picks a free one. interrupted: the exit code,
    once a signal has cancelled the launch. say: shows a line. write: shows the job's output.
    """

    config: RunConfig
    arguments: Sequence[str]
    resume: bool
    check: Callable[[], None]
    wait: float
    max_restarts: int
    resources: NodeResources
    dashboard_port: int | None
    interrupted: Callable[[], int]
    say: Callable[[str], None]
    write: Callable[[str], None]

    def fingerprint(self) -> str:
        """A hash of configuration and arguments: equal on all nodes of one launch. A head that was started
        again with --resume is of the same launch.
        """
        text = "\0".join([dump_config(self.config), *self.arguments])
        return hashlib.sha256(text.encode()).hexdigest()

    def command(self, *, resume: bool) -> str:
        """The training's command line, for a shell on the head."""
        program = [sys.executable, "-c", "from treepo.cli.main import main; main()", "train", *self.arguments]
        # Ray's job supervisor sets it to 1 if the cluster's environment does not have it.
        threads = os.environ.get("OMP_NUM_THREADS")
        setting = (
            "unset OMP_NUM_THREADS" if threads is None else f"export OMP_NUM_THREADS={shlex.quote(threads)}"
        )
        call = shlex.join([*program, *(["--resume"] if resume else [])])
        return f"cd {shlex.quote(os.getcwd())} && {setting} && exec {call}"


async def unless_ended[T](node: RayNode, work: Awaitable[T]) -> T:
    """The result of `work`. Raises ClusterError if Ray on this node ends first."""
    working, ended = asyncio.ensure_future(work), asyncio.ensure_future(node.ended())
    try:
        await asyncio.wait((working, ended), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClusterError(f"Ray on this node: {ended.result()}")
    finally:
        working.cancel()
        ended.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)


async def first_of(news: "asyncio.Future[Any]", node: RayNode) -> str | None:
    """Wait for the head's news, or for the end of Ray on this node: return None, or the reason of that end.

    If cancelled, wait a while longer for either: only the head can end the training.
    """
    ended = asyncio.ensure_future(node.ended())
    try:
        await asyncio.wait((news, ended), return_when=asyncio.FIRST_COMPLETED)
        return None if news.done() else ended.result()
    except asyncio.CancelledError:
        await asyncio.wait((news, ended), timeout=_FAREWELL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        raise
    finally:
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
