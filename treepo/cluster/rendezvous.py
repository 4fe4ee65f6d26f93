"""Lets the nodes of a launch find each other: every other node keeps one connection to the head.

The messages are JSON lines of at most 4 KiB. A node first says its rank and what it launches. Both sides then
prove that they have the launch's key (treepo.cluster.launch_key), so nobody else gets in or gets an answer.
The head sends Ray's address once Ray runs, again after it has started another Ray, and at the end the exit
code, so that every node ends with the same one. A head that is interrupted sends the code at once as a
warning, so that the nodes end with it even if the head is killed while it cleans up.

The head refuses a node that launches something else, because two launches that share a host may use the same
port. It refuses a rank that is connected, unless that node no longer answers: then the new one replaces it.
A broken connection means that the node, or the head, is gone. A machine that vanishes without a word is
noticed after 90 s.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import NoReturn

from treepo.cluster.launch_key import LaunchKey, new_nonce
from treepo.cluster.rendezvous_lines import MOST_BYTES, keep_alive, receive, send
from treepo.cluster.schedulers import Allocation
from treepo.errors import AllocationError

_HELLO_SECONDS = 90.0  # for a node to prove that it belongs; it may wait for the key's file to appear
_PING_SECONDS = 10.0  # for a node to answer while another one wants its rank
_LEAVE_SECONDS = 60.0  # for a node to stop what it started
_POLL_SECONDS = 0.1
_MOST_STRANGERS = 64  # connections that have not proved anything yet
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Node:
    """A node that has proved that it belongs. answered: set by each of its messages."""

    address: str
    writer: asyncio.StreamWriter
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Rendezvous:
    """The head's side.

    nodes: of the launch. config: fingerprint of what it launches. changed: called with the rank of each node
    that joins (true), or whose connection breaks before the end (false).
    """

    def __init__(self, nodes: int, config: str, key: LaunchKey, changed: Callable[[int, bool], None]) -> None:
        self._nodes, self._config, self._key, self._changed = nodes, config, key, changed
        self._there: dict[int, _Node] = {}
        self._ray: str | None = None
        self._exit_code: int | None = None
        self._warning: int | None = None
        self._strangers = 0

    @property
    def connected(self) -> dict[int, str]:
        """The address of each connected node, by rank."""
        return {rank: node.address for rank, node in self._there.items()}

    def missing(self) -> list[int]:
        """Ranks of the nodes that are not connected."""
        return [rank for rank in range(1, self._nodes) if rank not in self._there]

    def announce(self, ray: str | None) -> None:
        """Send Ray's address to the connected nodes, and to every node that connects later. None: the Ray
        that was announced has ended, and another one follows.
        """
        self._ray = ray
        for node in self._there.values():
            send(node.writer, {"ray": ray})

    def warn(self, exit_code: int) -> None:
        """Tell every node that the launch is ending: a head lost from now on has ended with the code."""
        self._warning = exit_code
        for node in self._there.values():
            send(node.writer, {"ending": exit_code})

    async def end(self, exit_code: int) -> None:
        """Send the exit code to every node, and wait until all have left, at most `_LEAVE_SECONDS`."""
        self._exit_code = exit_code
        for node in self._there.values():
            send(node.writer, {"exit": exit_code})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS):
                while self._there:
                    await asyncio.sleep(_POLL_SECONDS)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection until it ends."""
        if self._strangers >= _MOST_STRANGERS:
            writer.close()
            return
        self._strangers += 1
        try:
            keep_alive(writer)
            async with asyncio.timeout(_HELLO_SECONDS):
                rank = await self._admit(reader, writer)
        except (TimeoutError, OSError, EOFError, ValueError) as error:  # it is not a node of this launch
            _log.debug("the rendezvous turned a connection away: %s", error)
            writer.close()
            return
        finally:
            self._strangers -= 1
        await self._attend(rank, reader, writer)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        """The rank of a node that belongs. Raises ValueError for any other program."""
        hello = await receive(reader)
        rank, theirs, ours = hello.get("rank"), hello.get("nonce"), new_nonce()
        if not isinstance(theirs, str) or type(rank) is not int:
            raise ValueError("not a node's first message")
        if (hello.get("config"), hello.get("nodes")) != (self._config, self._nodes):
            _refuse(writer, "it launches another configuration, or on another number of nodes")
        if not 0 < rank < self._nodes:
            _refuse(writer, f"there is no node {rank} beside the head")
        proof = self._key.proof("head", theirs, ours)
        send(writer, {"key": self._key.id, "nonce": ours, "proof": proof})
        answer = await receive(reader)
        if not self._key.proves(answer.get("proof"), "node", ours, theirs):
            _refuse(writer, "it does not have the key of this launch")
        earlier = self._there.get(rank)
        if earlier is not None and await _answers(earlier):
            _refuse(writer, f"node {rank} is already connected, from {earlier.address}")
        return rank

    async def _attend(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        node = _Node("" if peer is None else peer[0], writer)
        earlier = self._there.get(rank)
        self._there[rank] = node
        if earlier is not None:
            earlier.writer.transport.abort()
        send(writer, {"welcome": True})
        if self._warning is not None:
            send(writer, {"ending": self._warning})
        if self._exit_code is not None:
            send(writer, {"exit": self._exit_code})
        elif self._ray is not None:
            send(writer, {"ray": self._ray})
        self._changed(rank, True)
        with suppress(OSError, EOFError, ValueError):
            while True:
                await receive(reader)
                node.answered.set()
        writer.close()
        if self._there.get(rank) is node:
            del self._there[rank]
            if self._exit_code is None and self._warning is None:
                self._changed(rank, False)


def _refuse(writer: asyncio.StreamWriter, reason: str) -> NoReturn:
    send(writer, {"refused": reason})
    raise ValueError(reason)


async def _answers(node: _Node) -> bool:
    node.answered.clear()
    send(node.writer, {"ping": True})
    with suppress(TimeoutError):
        await asyncio.wait_for(node.answered.wait(), _PING_SECONDS)
    return node.answered.is_set()


@asynccontextmanager
async def open_rendezvous(allocation: Allocation, host: str, rendezvous: Rendezvous) -> AsyncIterator[None]:
    """Listen on `host` alone, at the allocation's port, while the body runs.

    Raises AllocationError if the port is taken or the address is not this machine's.
    """
    try:
        server = await asyncio.start_server(rendezvous.serve, host, allocation.port, limit=MOST_BYTES)
    except OSError as error:
        raise AllocationError(
            f"the nodes cannot meet at {host}, port {allocation.port}: {error.strerror} (does another launch "
            "use it? choose another with --port)"
        ) from None
    try:
        yield
    finally:
        server.close()


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
