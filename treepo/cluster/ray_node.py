"""Ray's processes on this machine, started for one launch and ended with it: never another's.

Ports are free ones and Ray's files are in a folder of the launch's own, so that launches may share a host.
Ray's own servers listen on all interfaces, whatever one asks; a token that only this launch has keeps others
out. What the user has set about that (RAY_AUTH_MODE) is left alone.
"""

import asyncio
import ctypes
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_STOP_SECONDS = 45.0  # Ray gives actors 30 to end
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LINES = 5  # of Ray's words that an error shows


@dataclass(frozen=True, slots=True)
class Slots:
    """What a node offers; None: what Ray finds."""

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
        """Why it ended, as soon as it has."""
        code = await asyncio.shield(self._ended)
        last = " / ".join(self._log.read_text(errors="replace").split("\n")[-_LINES - 1 :]).strip(" /")
        return f"`ray start` ended with exit code {code}; the last that it said: {last}"

    async def stop(self) -> None:
        """End it and what it started, which is all in one session."""
        if not self._ended.done():
            self._process.terminate()
            await asyncio.wait((self._ended,), timeout=_STOP_SECONDS)
        for process in self._session():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await self._ended

    def _session(self) -> list[psutil.Process]:
        """What is left of it: nothing, unless Ray's end was not in order."""
        left: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError):
                if os.getsid(process.pid) == self._process.pid:
                    left.append(process)
        return left


def new_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that open the cluster to those who have them; the user's own where there are any."""
    if "RAY_AUTH_MODE" in environment:
        return {name: value for name, value in environment.items() if name.startswith("RAY_AUTH_")}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@asynccontextmanager
async def ray_head(
    address: str, port: int, dashboard_port: int, slots: Slots, secrets: Mapping[str, str]
) -> AsyncIterator[RayNode]:
    """A cluster's first node, while the block runs. Its dashboard, which takes jobs, is on loopback."""
    options = [
        "--head",
        f"--port={port}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={free_ports(1)[0]}",
    ]
    async with _ray_start(address, [*options, *slots.options()], secrets) as node:
        yield node


@asynccontextmanager
async def ray_worker(
    address: str, head: str, slots: Slots, secrets: Mapping[str, str]
) -> AsyncIterator[RayNode]:
    """A further node of the cluster at `head` (HOST:PORT), while the block runs."""
    async with _ray_start(address, [f"--address={head}", *slots.options()], secrets) as node:
        yield node


@asynccontextmanager
async def _ray_start(
    address: str, options: Sequence[str], secrets: Mapping[str, str]
) -> AsyncIterator[RayNode]:
    # Short: paths of sockets below it may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="treepo-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
    agent, autoscaler, dashboard = free_ports(3)
    environment = (
        os.environ
        | secrets
        | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "AUTOSCALER_METRIC_PORT": str(autoscaler),
            "DASHBOARD_METRIC_PORT": str(dashboard),
        }
    )
    environment.pop("RAY_ADDRESS", None)
    # Python's compiled modules halve the start of every worker.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [
        sys.executable,
        *("-m", "ray.scripts.scripts", "start", "--block", "--log-style=record", "--log-color=false"),
        f"--node-ip-address={address}",
        f"--temp-dir={folder}",
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
            preexec_fn=_end_with_parent,
        )
    node = RayNode(process, log)
    try:
        yield node
    finally:
        await node.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent() -> None:
    """In the child before it begins: SIGTERM when the launch is gone, however it ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]
