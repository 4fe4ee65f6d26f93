"""The lines of the rendezvous: one JSON object each, of bounded size, over a connection that notices a silent
machine.
"""

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import Any

from treepo.errors import shown

MOST_BYTES = 4096
"""Of one line."""

# A machine that loses power sends nothing: after 30 s of silence it is probed every 10 s, 6 times. What was
# sent to it stops the probes, so it has a deadline of its own.
_SILENT_SECONDS = 90
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 6),
    (socket.TCP_USER_TIMEOUT, _SILENT_SECONDS * 1000),
)


def send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    """Send a line. A broken connection shows when the other side's next line is read."""
    writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next line. Raises ValueError if it is too long or no JSON object, and EOFError if none comes."""
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError("it hangs up")
    try:
        message: Any = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ValueError(f"not a message of a launch: {shown(line)}")
    return message


def keep_alive(writer: asyncio.StreamWriter) -> None:
    """Make the kernel end the connection once the other machine has been silent for `_SILENT_SECONDS`."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
