"""Messages between nodes, and the answers of servers."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz.loop import Reader
from treepo.cluster.rendezvous import Connection, Rendezvous
from treepo.rewards.endpoint import BadReply, _decode


class _Writer:
    """A connection's other end, in memory."""

    def __init__(self) -> None:
        self.closed = False

    def get_extra_info(self, name: str) -> Any:
        return self if name == "socket" else ("127.0.0.1", 1)

    def setsockopt(self, *_: object) -> None: ...

    def write(self, data: bytes) -> None: ...

    def close(self) -> None:
        self.closed = True


def _stream(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def rendezvous_head(_: Path) -> Reader:
    """What a node, or a stranger, says to the head."""
    loop = asyncio.new_event_loop()
    hello = {"rank": 1, "nodes": 2, "config": "c"}

    async def serve(data: bytes) -> None:
        lost: list[int] = []
        head, writer = Rendezvous(2, "c", lost.append), _Writer()
        await head.serve(_stream(data), writer)  # type: ignore[arg-type]  # what it uses of a StreamWriter
        assert writer.closed
        assert not head.connected
        assert all(0 < rank < 2 for rank in lost), f"it lost {lost}"

    seeds = (json.dumps(hello).encode() + b"\n", json.dumps(hello | {"nodes": 3}).encode() + b"\n")
    words = (b'"rank": ', b'"nodes": ', b'"config": ', b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01")
    return Reader("rendezvous_head", lambda data: loop.run_until_complete(serve(data)), seeds, words)


def rendezvous_node(_: Path) -> Reader:
    """What the head says to a node."""
    loop = asyncio.new_event_loop()

    async def listen(data: bytes) -> object:
        connection = Connection("head:1", _stream(data), _Writer())  # type: ignore[arg-type]  # as above
        found = await connection.next()
        if not isinstance(found, int):
            for text in (found.address, *found.secrets, *found.secrets.values()):
                assert b"\0" not in os.fsencode(text), "it cannot be an environment variable"
        return found

    seeds = (
        b'{"address": "10.0.0.1:6379", "secrets": {"RAY_TOKEN": "t"}}\n{"exit": 3}\n',
        b'{"refused": "no"}\n',
    )
    words = (b'"exit": ', b'"refused": ', b'"address": ', b'"secrets": ')
    return Reader("rendezvous_node", lambda data: loop.run_until_complete(listen(data)), seeds, words)


def server_answer(_: Path) -> Reader:
    """SGLang's answer to /generate."""
    from sglang_rollout.http_engine import ServerEngine

    answer = {
        "text": "x",
        "meta_info": {
            "finish_reason": {"type": "length", "length": 2},
            "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
            "weight_version": "3",
            "cached_tokens": 1,
        },
    }
    stopped = json.loads(json.dumps(answer))
    stopped["meta_info"]["finish_reason"] = {"type": "abort", "message": "m"}

    def read(data: bytes) -> object:
        try:
            value = json.loads(data.decode())
        except (ValueError, RecursionError):
            return None
        found = ServerEngine("http://h", (8,), 1.0, boundaries=True)._output(value, 2)
        np.full(len(found.tokens), found.version, dtype=np.int32)  # as in the tree
        return found

    words = (b'"meta_info": ', b'"finish_reason": ', b'"output_token_logprobs": ', b'"cached_tokens": ')
    return Reader("server_answer", read, [json.dumps(answer).encode(), json.dumps(stopped).encode()], words)


def grades(_: Path) -> Reader:
    """A reward endpoint's reply."""
    seeds = (
        b'{"grades": [1.0, {"reward": 0.5, "correct": true, "length": 3, "note": "x"}]}',
        b'{"grades": [null, {"reward": -1}]}',
    )
    words = (b'"grades": ', b'"reward": ', b'"correct": ')
    return Reader("grades", lambda data: _decode(data, 2), seeds, words, (BadReply,))
