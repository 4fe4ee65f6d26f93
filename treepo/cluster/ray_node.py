"""Starts Ray on this machine for one launch, and ends it with the launch, never another launch's Ray.

Launches can share a host: each uses free ports, and a folder of its own for Ray's files. A cluster of one
node listens on loopback. Of several nodes, Ray's servers listen on all interfaces and cannot be told
otherwise, so a token that only this launch has keeps others out. If the user has set RAY_AUTH_MODE, that
setting stays.
"""

import asyncio
import os
import random
import re
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil

from treepo.data.temporary_folder import temporary_folder
from treepo.errors import without_colors
from treepo.processes import die_with_parent

_STOP_SECONDS = 45.0  # Ray gives its actors 30 s to end
_ABOVE_WORKERS = 20_000  # Ray's default for its workers is 10002 to 19999
_FOLDER = "r"  # short, because of the paths of the sockets below it
SOCKET_ROOM = len(f"/{_FOLDER}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""Bytes that the paths of Ray's sockets need below the folder that has `ray_folder`."""
RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_event_stats": "0", "RAY_worker_niceness": "0"}
"""Environment of a Ray that sends no reports, does not write a table of its own timings to its logs every
minute, and does not make engines and trainer give way to every other process, graders included (its niceness
of workers is 15). A user's settings go first.
"""
_LINES = 5  # of Ray's output that an error shows
_NOISE = re.compile(r"\[0x[0-9a-f]+\]|\*\*\* StackTrace|-{5}|Remaining processes will be killed")


@dataclass(frozen=True, slots=True)
class NodeResources:
    """The resources that a node offers to Ray; None means all that Ray finds."""

    cpus: int | None = None
    gpus: int | None = None

    def options(self) -> list[str]:
        values = {"--num-cpus": self.cpus, "--num-gpus": self.gpus}
        return [f"{name}={value}" for name, value in values.items() if value is not None]


class RayNode:
    """A running `ray start --block`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process, self._log = process, log
        self._ended = asyncio.ensure_future(process.wait())

    async def ended(self) -> str:
        """Wait until it ends; returns the reason."""
        code = await asyncio.shield(self._ended)
        last = last_lines(self._log.read_text(errors="replace"))
        return f"`ray start` ended with exit code {code}; its last output: {last}"

    async def stop(self) -> None:
        """End Ray and every process that it started: all of them are in one session."""
        if not self._ended.done():
            self._process.terminate()
            await asyncio.wait((self._ended,), timeout=_STOP_SECONDS)
        for process in self._session():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await self._ended

    def _session(self) -> list[psutil.Process]:
        """The processes that are left; none if Ray ended properly."""
        left: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError):
                if os.getsid(process.pid) == self._process.pid:
                    left.append(process)
        return left


def last_lines(output: str) -> str:
    """The last lines that say something, in one line: Ray adds the stacks of its processes, and rulers."""
    lines = [line.strip() for line in without_colors(output).splitlines()]
    return " / ".join([line for line in lines if line and not _NOISE.search(line)][-_LINES:])


def ray_folder(folder: Path) -> Path:
    """Ray's own folder in a private one; Ray lets everybody into its own."""
    return folder / _FOLDER


def new_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that give access to the cluster: the user's own RAY_AUTH_* if RAY_AUTH_MODE is
    set, else a new token.
    """
    if "RAY_AUTH_MODE" in environment:
        return {name: value for name, value in environment.items() if name.startswith("RAY_AUTH_")}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": new_token()}


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_hex(32)


@asynccontextmanager
async def ray_head(
    address: str, port: int, dashboard_port: int, resources: NodeResources, secrets: Mapping[str, str]
) -> AsyncIterator[RayNode]:
    """Run a cluster's first node while the body runs. Its dashboard, which takes jobs, is on loopback."""
    options = [
        "--head",
        f"--port={port}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={free_ports(1)[0]}",
    ]
    async with _ray_start(address, [*options, *resources.options()], secrets) as node:
        yield node


@asynccontextmanager
async def ray_worker(
    address: str, head: str, resources: NodeResources, secrets: Mapping[str, str]
) -> AsyncIterator[RayNode]:
    """Run another node of the cluster at `head` (HOST:PORT) while the body runs."""
    async with _ray_start(address, [f"--address={head}", *resources.options()], secrets) as node:
        yield node


@asynccontextmanager
async def _ray_start(
    address: str, options: Sequence[str], secrets: Mapping[str, str]
) -> AsyncIterator[RayNode]:
    with temporary_folder(SOCKET_ROOM) as folder:
        node = await _started(folder, address, options, secrets)
        try:
            yield node
        finally:
            await node.stop()


async def _started(folder: Path, address: str, options: Sequence[str], secrets: Mapping[str, str]) -> RayNode:
    """A node whose files are in the folder, which is TMPDIR of its processes too."""
    agent, autoscaler, dashboard = free_ports(3)
    ports = {"AUTOSCALER_METRIC_PORT": str(autoscaler), "DASHBOARD_METRIC_PORT": str(dashboard)}
    environment = {**RAY_SETTINGS, **os.environ, **secrets, **ports}
    if ip_address(address).is_loopback:
        # Ray replaces a loopback address, except on systems on which it knows no clusters.
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    environment.pop("RAY_ADDRESS", None)
    # Compiled Python modules halve the start of every worker.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [
        sys.executable,
        *("-m", "ray.scripts.scripts", "start", "--block", "--log-style=record", "--log-color=false"),
        f"--node-ip-address={address}",
        f"--temp-dir={ray_folder(folder)}",
        f"--dashboard-agent-listen-port={agent}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        *options,
    ]
    log = folder / "ray-start.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_set_signals,
        )
    return RayNode(process, log)


def _set_signals() -> None:
    """Make the kernel send this child SIGTERM when the launch ends, even if the launch is killed.

    A launch in the background of a shell ignores SIGINT. Its Ray must not, because it ends a job by that.
    """
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_ports(count: int) -> list[int]:
    """Different ports on which nothing listens now.

    Ray binds them seconds later. So they lie below the ports that the system gives to connections and above
    the ports of Ray's workers, if there are enough.
    """
    between = range(_ABOVE_WORKERS, _first_of_connections())
    ports = [*random.sample(between, len(between)), *([0] * count)]
    free: list[int] = []
    with ExitStack() as stack:
        for port in ports:
            if len(free) == count:
                break
            with suppress(OSError):  # something listens there
                server = stack.enter_context(socket.create_server(("", port)))
                free.append(server.getsockname()[1])
    return free


def _first_of_connections() -> int:
    """The lowest port that the system gives to a connection."""
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
