"""A node's side of the rendezvous (treepo.cluster.rendezvous): its connection to the head."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo.cluster.launch_key import LaunchKey, new_nonce, read_key
from treepo.cluster.rendezvous_lines import MOST_BYTES, keep_alive, receive, send
from treepo.cluster.schedulers import Allocation
from treepo.errors import AllocationError, ClusterError

_HELLO_SECONDS = 90.0  # for a handshake, in which the head's key may take a while to appear
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class NewRay:
    """Ray's address; None if the Ray that was announced has ended and another one follows."""

    address: str | None


class LostHeadError(ClusterError):
    """The head is gone and did not say how the launch ended."""


class Connection:
    """A node's side. host: this machine's address on the route to the head."""

    def __init__(
        self, head: str, key: LaunchKey, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.host: str = writer.get_extra_info("sockname")[0]
        self.secrets = key.secrets
        self._head, self._reader, self._writer = head, reader, writer
        self._ending: int | None = None  # the exit code of a head that is ending

    async def next(self) -> NewRay | int:
        """Wait for Ray's address, or for the exit code of a launch that has ended.

        Raises LostHeadError if the head is gone without a warning.
        """
        while True:
            try:
                message = await receive(self._reader)
            except (OSError, EOFError, ValueError):
                if self._ending is not None:
                    return self._ending
                raise LostHeadError(
                    f"the head at {self._head} is gone and did not say how the launch ended"
                ) from None
            match message:
                case {"ping": True}:
                    send(self._writer, {"pong": True})
                case {"exit": int(code)}:
                    return code
                case {"ending": int(code)}:
                    self._ending = code
                case {"ray": None}:
                    return NewRay(None)
                case {"ray": str(address)} if address.isascii() and address.isprintable():
                    return NewRay(address)
                case _:
                    raise ClusterError(f"the head at {self._head} is of another version of treepo")

    def close(self) -> None:
        self._writer.close()


async def join(allocation: Allocation, config: str, out: Path, seconds: float) -> Connection:
    """Connect to the head, which may not have started yet.

    out: the run folder. Raises ClusterError after `seconds`, and AllocationError if the head refuses this
    node, or is none of a launch.
    """
    head = f"{allocation.head}:{allocation.port}"
    reason = "no answer"
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    async with asyncio.timeout(_HELLO_SECONDS):
                        return await _connect(allocation, config, out)
                except TimeoutError:
                    reason = "no answer"
                except EOFError as error:
                    reason = str(error)
                except OSError as error:  # its name does not resolve yet, or it does not listen yet
                    reason = error.strerror or str(error)
                except ValueError as error:
                    raise AllocationError(f"{head} is not a launch's head: {error}") from None
                await asyncio.sleep(_RETRY_SECONDS)
    except TimeoutError:
        raise ClusterError(f"no head at {head} within {seconds:g} s: {reason}") from None


async def _connect(allocation: Allocation, config: str, out: Path) -> Connection:
    """Raises ValueError if what listens there does not speak as a head, and EOFError if it hangs up."""
    head = f"{allocation.head}:{allocation.port}"
    reader, writer = await asyncio.open_connection(allocation.head, allocation.port, limit=MOST_BYTES)
    try:
        keep_alive(writer)
        ours = new_nonce()
        hello = {"rank": allocation.rank, "nodes": allocation.nodes, "config": config, "nonce": ours}
        send(writer, hello)
        answer = _not_refused(head, await receive(reader))
        key, theirs = await read_key(out, answer.get("key")), answer.get("nonce")
        if not isinstance(theirs, str) or not key.proves(answer.get("proof"), "head", ours, theirs):
            raise AllocationError(f"what answers at {head} is not the head of this launch: it lacks the key")
        send(writer, {"proof": key.proof("node", theirs, ours)})
        if _not_refused(head, await receive(reader)) != {"welcome": True}:
            raise ValueError("it does not speak as a launch's head")
    except BaseException:
        writer.close()
        raise
    return Connection(head, key, reader, writer)


def _not_refused(head: str, message: dict[str, Any]) -> dict[str, Any]:
    if "refused" in message:
        raise AllocationError(f"the head at {head} refuses this node: {message['refused']}")
    return message
