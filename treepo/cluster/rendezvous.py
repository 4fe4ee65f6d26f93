"""How the nodes of a launch find each other: each of the others keeps one connection to the head.

JSON lines. A node says who it is and what it launches. The head says where Ray is and what opens it once that
is there, and at the end how the launch ended: so every node ends with the same exit code. Who launches
something else, or has the rank of a node that is here already, is refused: two launches that share a host may
have been given the same port. A connection that breaks is a node, or a head, that is gone.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from treepo.cluster.schedulers import Allocation
from treepo.errors import AllocationError, ClusterError

_HELLO_SECONDS = 30.0
_RETRY_SECONDS = 1.0
_LEAVE_SECONDS = 60.0  # in which a node stops what it started
_LOOK_SECONDS = 0.1
# A machine that loses power says nothing: after so many seconds of silence it is asked, so often.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says first. config: fingerprint of what it launches."""

    rank: int
    nodes: int
    config: str


@dataclass(frozen=True, slots=True)
class RayAddress:
    """Where Ray is. secrets: the environment variables that open it."""

    address: str
    secrets: Mapping[str, str]


class Gathering:
    """The head's side. here: the address of each node that is connected, by rank.

    lost: told of each node whose connection breaks before the end.
    """

    def __init__(self, nodes: int, config: str, lost: Callable[[int], None]) -> None:
        self.here: dict[int, str] = {}
        self._nodes, self._config, self._lost = nodes, config, lost
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._ray: RayAddress | None = None
        self._ending = False

    def missing(self) -> list[int]:
        """Ranks of the nodes that are not here."""
        return [rank for rank in range(1, self._nodes) if rank not in self.here]

    def announce(self, ray: RayAddress) -> None:
        """Ray is there: tell those who are here and those who come."""
        self._ray = ray
        for writer in self._writers.values():
            _say(writer, asdict(ray))

    async def end(self, exit_code: int) -> None:
        """Tell every node how it ended, and wait until it has left."""
        self._ending = True
        for writer in self._writers.values():
            _say(writer, {"exit": exit_code})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS):
                while self.here:
                    await asyncio.sleep(_LOOK_SECONDS)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until it ends."""
        _keep_alive(writer)
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                hello = Hello(**json.loads(await reader.readline()))
        except (TimeoutError, OSError, ValueError, TypeError):
            writer.close()  # something that came to the port by chance
            return
        refusal = self._refusal(hello)
        if refusal is not None:
            _say(writer, {"refused": refusal})
            writer.close()
            return
        self.here[hello.rank] = writer.get_extra_info("peername")[0]
        self._writers[hello.rank] = writer
        if self._ray is not None:
            _say(writer, asdict(self._ray))
        with suppress(OSError):
            await reader.read()
        del self.here[hello.rank], self._writers[hello.rank]
        writer.close()
        if not self._ending:
            self._lost(hello.rank)

    def _refusal(self, hello: Hello) -> str | None:
        if (hello.config, hello.nodes) != (self._config, self._nodes):
            return "it launches another configuration, or on another number of nodes"
        if hello.rank in self.here:
            return f"node {hello.rank} is there already, at {self.here[hello.rank]}"
        return None


@asynccontextmanager
async def gather(
    allocation: Allocation, host: str, config: str, lost: Callable[[int], None]
) -> AsyncIterator[Gathering]:
    """Listen on `host` at the allocation's port while the block runs. Raises AllocationError where that
    cannot be done.
    """
    gathering = Gathering(allocation.nodes, config, lost)
    try:
        server = await asyncio.start_server(gathering.serve, host, allocation.port)
    except OSError as error:
        raise AllocationError(
            f"the nodes cannot meet at {host}, port {allocation.port}: {error.strerror} (is it another "
            "launch's? --port has another)"
        ) from None
    try:
        yield gathering
    finally:
        server.close()


class Connection:
    """A node's side. host: this machine's address on the way to the head."""

    def __init__(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.host: str = writer.get_extra_info("sockname")[0]
        self._head, self._reader, self._writer = head, reader, writer

    async def next(self) -> RayAddress | int:
        """Where Ray is, or the exit code of a launch that has ended. Raises ClusterError where the head is
        gone, and AllocationError where it refuses this node.
        """
        try:
            line = await self._reader.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise ClusterError(f"the head at {self._head} is gone, and has not said how the launch ended")
        message: dict[str, Any] = json.loads(line)
        if "refused" in message:
            raise AllocationError(f"the head at {self._head} refuses this node: {message['refused']}")
        return message["exit"] if "exit" in message else RayAddress(**message)

    def close(self) -> None:
        self._writer.close()


async def join(allocation: Allocation, config: str, seconds: float) -> Connection:
    """Connect to the head, which may be yet to start. Raises ClusterError after `seconds`."""
    head = f"{allocation.head}:{allocation.port}"
    reason = ""
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    reader, writer = await asyncio.open_connection(allocation.head, allocation.port)
                    break
                except OSError as error:  # it has no name yet, or does not listen yet
                    reason = error.strerror or str(error)
                await asyncio.sleep(_RETRY_SECONDS)
    except TimeoutError:
        raise ClusterError(f"no head at {head} within {seconds:g} s: {reason or 'no answer'}") from None
    _keep_alive(writer)
    _say(writer, asdict(Hello(allocation.rank, allocation.nodes, config)))
    return Connection(head, reader, writer)


def own_address(allocation: Allocation) -> str:
    """The address of the head's name, on the head itself. Many systems map a machine's own name to a loopback
    address; then it is that of the route to the outside. Raises AllocationError where it is of another
    machine.
    """
    try:
        addresses = [entry[4][0] for entry in socket.getaddrinfo(allocation.head, None, socket.AF_INET)]
    except OSError as error:
        raise AllocationError(f"the head {allocation.head} ({allocation.source}): {error.strerror}") from None
    address = str(addresses[0])
    if address.startswith("127.") and allocation.head != address:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # nothing is sent; reserved for documentation
            address = probe.getsockname()[0]
    try:
        socket.create_server((address, 0)).close()
    except OSError:
        raise AllocationError(
            f"{allocation.head} ({address}) is the head of {allocation.source}, but not this machine, which "
            "is node 0"
        ) from None
    return address


def _say(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
