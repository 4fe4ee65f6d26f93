"""Lets the nodes of a launch find each other: every other node keeps one connection to the head.

The messages are JSON lines. A node first says its rank and what it launches. The head answers with Ray's
address and secrets once Ray runs, and at the end with the exit code, so that every node ends with the same
one. The head refuses a node that launches something else, because two launches that share a host may use the
same port, and a node whose rank is already connected. A broken connection means that the node, or the head,
is gone.
"""

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from treepo.cluster.schedulers import Allocation
from treepo.errors import AllocationError, ClusterError, shown

_HELLO_SECONDS = 30.0
_RETRY_SECONDS = 1.0
_LEAVE_SECONDS = 60.0  # for a node to stop what it started
_POLL_SECONDS = 0.1
# A machine that loses power sends nothing: after 30 s of silence it is probed every 10 s, 6 times.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


@dataclass(frozen=True, slots=True)
class Hello:
    """A node's first message. config: fingerprint of what it launches."""

    rank: int
    nodes: int
    config: str


@dataclass(frozen=True, slots=True)
class RayAddress:
    """Where Ray listens. secrets: the environment variables that give access to it."""

    address: str
    secrets: Mapping[str, str]


class Rendezvous:
    """The head's side.

    connected: the address of each connected node, by rank. lost: called with the rank of each node whose
    connection breaks before the end.
    """

    def __init__(self, nodes: int, config: str, lost: Callable[[int], None]) -> None:
        self.connected: dict[int, str] = {}
        self._nodes, self._config, self._lost = nodes, config, lost
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._ray: RayAddress | None = None
        self._ending = False

    def missing(self) -> list[int]:
        """Ranks of the nodes that are not connected."""
        return [rank for rank in range(1, self._nodes) if rank not in self.connected]

    def announce(self, ray: RayAddress) -> None:
        """Send Ray's address to the connected nodes, and to every node that connects later."""
        self._ray = ray
        for writer in self._writers.values():
            _send(writer, asdict(ray))

    async def end(self, exit_code: int) -> None:
        """Send the exit code to every node, and wait until all have left."""
        self._ending = True
        for writer in self._writers.values():
            _send(writer, {"exit": exit_code})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS):
                while self.connected:
                    await asyncio.sleep(_POLL_SECONDS)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection until it ends."""
        _keep_alive(writer)
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                hello = _hello(await reader.readline())
        except (TimeoutError, OSError, ValueError, TypeError, RecursionError):
            writer.close()  # it is not a node of a launch
            return
        refusal = self._refusal(hello)
        if refusal is not None:
            _send(writer, {"refused": refusal})
            writer.close()
            return
        self.connected[hello.rank] = writer.get_extra_info("peername")[0]
        self._writers[hello.rank] = writer
        if self._ray is not None:
            _send(writer, asdict(self._ray))
        with suppress(OSError):
            await reader.read()
        del self.connected[hello.rank], self._writers[hello.rank]
        writer.close()
        if not self._ending:
            self._lost(hello.rank)

    def _refusal(self, hello: Hello) -> str | None:
        if (hello.config, hello.nodes) != (self._config, self._nodes):
            return "it launches another configuration, or on another number of nodes"
        if hello.rank in self.connected:
            return f"node {hello.rank} is already connected, from {self.connected[hello.rank]}"
        return None


@asynccontextmanager
async def open_rendezvous(
    allocation: Allocation, host: str, config: str, lost: Callable[[int], None]
) -> AsyncIterator[Rendezvous]:
    """Listen on `host` at the allocation's port while the body runs.

    Raises AllocationError if the port is taken or the address is not this machine's.
    """
    rendezvous = Rendezvous(allocation.nodes, config, lost)
    try:
        server = await asyncio.start_server(rendezvous.serve, host, allocation.port)
    except OSError as error:
        raise AllocationError(
            f"the nodes cannot meet at {host}, port {allocation.port}: {error.strerror} (does another launch "
            "use it? choose another with --port)"
        ) from None
    try:
        yield rendezvous
    finally:
        server.close()


class Connection:
    """A node's side. host: this machine's address on the route to the head."""

    def __init__(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.host: str = writer.get_extra_info("sockname")[0]
        self._head, self._reader, self._writer = head, reader, writer

    async def next(self) -> RayAddress | int:
        """Wait for Ray's address, or for the exit code of a launch that has ended.

        Raises ClusterError if the head is gone, and AllocationError if it refuses this node.
        """
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):  # ValueError: a line of more than 64 KiB
            line = b""
        if not line.endswith(b"\n"):
            raise ClusterError(f"the head at {self._head} is gone and did not say how the launch ended")
        try:
            message: dict[str, Any] = json.loads(line)
            if "refused" in message:
                raise AllocationError(f"the head at {self._head} refuses this node: {message['refused']}")
            return int(message["exit"]) if "exit" in message else _ray_address(message)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            raise AllocationError(
                f"{self._head} is not a launch's head, but another program's port: it says {shown(line)}"
            ) from None

    def close(self) -> None:
        self._writer.close()


async def join(allocation: Allocation, config: str, seconds: float) -> Connection:
    """Connect to the head, which may not have started yet. Raises ClusterError after `seconds`."""
    head = f"{allocation.head}:{allocation.port}"
    reason = ""
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    reader, writer = await asyncio.open_connection(allocation.head, allocation.port)
                    break
                except OSError as error:  # its name does not resolve yet, or it does not listen yet
                    reason = error.strerror or str(error)
                await asyncio.sleep(_RETRY_SECONDS)
    except TimeoutError:
        raise ClusterError(f"no head at {head} within {seconds:g} s: {reason or 'no answer'}") from None
    _keep_alive(writer)
    _send(writer, asdict(Hello(allocation.rank, allocation.nodes, config)))
    return Connection(head, reader, writer)


def own_address(allocation: Allocation) -> str:
    """Find the address at which the other nodes reach the head. Called on the head.

    It is the address of the head's name. Many systems map a machine's own name to a loopback address; then it
    is the address of the default route. Raises AllocationError if the address belongs to another machine.
    """
    try:
        addresses = [entry[4][0] for entry in socket.getaddrinfo(allocation.head, None, socket.AF_INET)]
    except OSError as error:
        raise AllocationError(f"the head {allocation.head} ({allocation.source}): {error.strerror}") from None
    address = str(addresses[0])
    if address.startswith("127.") and allocation.head != address:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # reserved for documentation; nothing is sent
            address = probe.getsockname()[0]
    try:
        socket.create_server((address, 0)).close()
    except OSError:
        raise AllocationError(
            f"{allocation.head} ({address}) is the head of {allocation.source}, but not this machine, which "
            "is node 0"
        ) from None
    return address


def _hello(line: bytes) -> Hello:
    """Read a node's first message. Raises ValueError or TypeError if it is none."""
    hello = Hello(**json.loads(line))
    if type(hello.rank) is not int or not 0 < hello.rank < hello.nodes:
        raise ValueError(f"rank {hello.rank!r}")
    return hello


def _ray_address(message: Mapping[str, Any]) -> RayAddress:
    """Read where Ray listens. Raises ValueError or TypeError if the message does not say."""
    ray = RayAddress(**message)
    texts = [ray.address, *itertools.chain.from_iterable(ray.secrets.items())]
    if not all(isinstance(text, str) and text.isascii() and text.isprintable() for text in texts):
        raise ValueError("an address and secrets go into the environment")
    return ray


def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
