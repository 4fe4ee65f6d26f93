"""The rendezvous of a launch's nodes at the head, over real sockets."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from treepo.cluster import launch_key
from treepo.cluster import rendezvous as rendezvous_module
from treepo.cluster.join import LostHeadError, NewRay, join
from treepo.cluster.launch_key import LaunchKey, read_key, remove_old_keys, shared_key
from treepo.cluster.ray_node import free_ports
from treepo.cluster.rendezvous import Rendezvous, open_rendezvous, own_address
from treepo.cluster.schedulers import Allocation
from treepo.errors import AllocationError, ClusterError

RAY = NewRay("10.0.0.1:6379")
SECRETS = {"RAY_AUTH_TOKEN": "secret"}
SECONDS = 20.0


def allocation(rank: int, port: int, nodes: int = 3) -> Allocation:
    return Allocation("a test", nodes, rank, "127.0.0.1", port)


@asynccontextmanager
async def head(out: Path, changes: list[tuple[int, bool]]) -> AsyncIterator[tuple[Rendezvous, int]]:
    (port,) = free_ports(1)
    with shared_key(out, SECRETS) as key:
        rendezvous = Rendezvous(3, "same", key, lambda *change: changes.append(change))
        async with open_rendezvous(allocation(0, port), "127.0.0.1", rendezvous):
            yield rendezvous, port


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def test_every_node_learns_where_ray_is_and_how_it_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        out, changes = tmp_path / "run", []
        async with head(out, changes) as (rendezvous, port):
            assert rendezvous.missing() == [1, 2]
            early = await join(allocation(2, port), "same", out, SECONDS)
            await until(lambda: rendezvous.missing() == [1])
            rendezvous.announce(RAY.address)
            late = await join(allocation(1, port), "same", out, SECONDS)
            assert await early.next() == await late.next() == RAY
            assert early.secrets == SECRETS
            assert early.host == rendezvous.connected[2] == "127.0.0.1"
            rendezvous.announce(None)
            rendezvous.announce("10.0.0.1:6380")
            assert [await early.next(), await early.next()] == [NewRay(None), NewRay("10.0.0.1:6380")]
            ending = asyncio.create_task(rendezvous.end(7))
            assert await early.next() == 7
            assert [await late.next() for _ in range(3)][-1] == 7
            early.close()
            await asyncio.sleep(0)
            assert not ending.done(), "it waits until all have left"
            late.close()
            await ending
        assert changes == [(2, True), (1, True)]
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scenario())


def test_a_node_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        out = tmp_path / "run"
        async with head(out, []) as (rendezvous, port):
            first = await join(allocation(1, port), "same", out, SECONDS)
            answering = asyncio.create_task(first.next())
            await until(lambda: rendezvous.missing() == [2])
            for stranger, config, reason in (
                (allocation(1, port), "same", "node 1 is already connected, from 127.0.0.1"),
                (allocation(2, port), "other", "launches another configuration"),
                (allocation(2, port, nodes=4), "same", "another number of nodes"),
            ):
                with pytest.raises(AllocationError, match=reason):
                    await join(stranger, config, out, SECONDS)
            assert rendezvous.missing() == [2]
            answering.cancel()
            first.close()

    asyncio.run(scenario())


NOISE = (
    b"GET / HTTP/1.1\r\n\r\n",
    b'{"rank": 2}\n',
    b'{"rank": [], "nodes": 3, "config": "same", "nonce": "n"}\n',
    b'{"rank": 0, "nodes": 3, "config": "same", "nonce": "n"}\n',
    b'{"rank": 9, "nodes": 3, "config": "same", "nonce": "n"}\n',
    b'{"rank": 2, "nodes": 3, "config": "same", "nonce": "n"}\n{"proof": "guessed"}\n',
    b'{"rank": 2, "nodes": 3, "config": "same", "nonce": "n"}\n{"proof": {}}\n',
    b"[" * 4000 + b"\n",
    b"x" * 100_000,
    b"\xff\x00\n",
    b"",
)


def test_noise_and_strangers_get_no_secret_and_end_nothing(tmp_path: Path) -> None:
    """What a port scanner sends, what someone sends who knows the launch but not its key, and connections
    that say nothing.
    """

    async def scenario() -> None:
        out = tmp_path / "run"
        async with head(out, []) as (rendezvous, port):
            rendezvous.announce(RAY.address)
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
            for noise in NOISE:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                with suppress(ConnectionError):  # the head has hung up
                    writer.write(noise)
                    writer.write_eof()
                    said = await reader.read()
                    assert b"secret" not in said
                    assert b"6379" not in said
                writer.close()
            assert rendezvous.missing() == [1, 2]
            connection = await join(allocation(2, port), "same", out, SECONDS)
            assert await connection.next() == RAY
            connection.close()
            for _, writer in silent:
                writer.close()

    asyncio.run(scenario())


def test_connections_that_prove_nothing_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous_module, "_MOST_STRANGERS", 2)

    async def scenario() -> None:
        out = tmp_path / "run"
        async with head(out, []) as (_, port):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            assert await silent[2][0].read() == b"", "the third is turned away at once"
            silent[0][1].close()
            silent[1][1].close()
            (await join(allocation(1, port), "same", out, SECONDS)).close()
            silent[2][1].close()

    asyncio.run(scenario())


def test_a_node_that_is_lost_is_reported_and_may_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        out, changes = tmp_path / "run", []
        async with head(out, changes) as (rendezvous, port):
            (await join(allocation(2, port), "same", out, SECONDS)).close()
            await until(lambda: changes == [(2, True), (2, False)])
            assert rendezvous.missing() == [1, 2]
            again = await join(allocation(2, port), "same", out, SECONDS)
            await until(lambda: rendezvous.missing() == [1])
            again.close()

    asyncio.run(scenario())


def test_a_node_that_no_longer_answers_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine has vanished, and the kernel has not noticed yet."""
    monkeypatch.setattr(rendezvous_module, "_PING_SECONDS", 0.05)

    async def scenario() -> None:
        out, changes = tmp_path / "run", []
        async with head(out, changes) as (rendezvous, port):
            mute = await join(allocation(1, port), "same", out, SECONDS)
            successor = await join(allocation(1, port), "same", out, SECONDS)
            rendezvous.announce(RAY.address)
            assert await successor.next() == RAY
            with pytest.raises(LostHeadError):
                await mute.next()
            assert rendezvous.missing() == [2]
            assert changes == [(1, True), (1, True)]
            mute.close()
            successor.close()

    asyncio.run(scenario())


def test_a_head_that_is_gone_never_listens_or_is_something_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        (port,) = free_ports(1)
        with pytest.raises(ClusterError, match=rf"no head at 127.0.0.1:{port} within 0.1 s: "):
            await join(allocation(1, port), "same", tmp_path / "run", 0.1)

        async def another(answer: bytes) -> None:
            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readline()
                writer.write(answer)
                writer.close()

            async with await asyncio.start_server(serve, "127.0.0.1", port):
                await join(allocation(1, port), "same", tmp_path / "run", 0.1)

        with pytest.raises(ClusterError, match=r"within 0.1 s: it hangs up"):
            await another(b"")
        for answer, reason in (
            (b"HTTP/1.1 400 Bad Request\r\n", r"is not a launch's head: not a message of a launch: b'HTTP"),
            (b'{"key": "../../etc/passwd"}\n', "what answers at the head's address is not a launch's head"),
            (b"y" * 100_000 + b"\n", "is not a launch's head: "),
        ):
            with pytest.raises(AllocationError, match=reason):
                await another(answer)

    asyncio.run(scenario())


def test_a_node_tells_nothing_to_a_head_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody listens at the head's port and answers as a head does, with the name of a key that exists."""
    monkeypatch.setattr(launch_key, "_SEEN_SECONDS", 0.0)

    async def scenario() -> None:
        (port,) = free_ports(1)
        heard: list[bytes] = []
        with shared_key(tmp_path / "run", SECRETS) as key:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                heard.append(await reader.readline())
                answer = {"key": key.id, "nonce": "n", "proof": "0" * 64}
                writer.write(json.dumps(answer).encode() + b"\n")
                heard.append(await reader.read())
                writer.close()

            async with await asyncio.start_server(serve, "127.0.0.1", port):
                with pytest.raises(AllocationError, match="it lacks the key"):
                    await join(allocation(1, port), "same", tmp_path / "run", SECONDS)
                await until(lambda: len(heard) == 2)
            assert heard[1] == b""
            assert b"secret" not in heard[0]
            with pytest.raises(AllocationError, match="all nodes must share the file system"):
                await read_key(tmp_path / "other", key.id)

    asyncio.run(scenario())


def test_the_key_is_private_and_removed(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "[a]"
    with shared_key(out, SECRETS) as key:
        (path,) = out.parent.iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        assert "secret" not in repr(key)
        other = path.with_name(f".[a].launch-{'0' * 16}")
        other.touch()
        path.with_name(".b.launch-0").touch()
        remove_old_keys(out, key)
        assert {file.name for file in out.parent.iterdir()} == {path.name, ".b.launch-0"}
    assert not path.exists()
    (tmp_path / "file").touch()
    with (
        pytest.raises(AllocationError, match=r"out: the nodes' key .*"),
        shared_key(tmp_path / "file" / "x", {}),
    ):
        raise AssertionError("it is written")


def test_a_taken_port_is_an_error() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            rendezvous = Rendezvous(3, "same", LaunchKey("", "", {}), lambda *_: None)
            with pytest.raises(AllocationError, match=f"port {port}: .* another launch"):
                async with open_rendezvous(allocation(0, port), "127.0.0.1", rendezvous):
                    raise AssertionError("it listens on a taken port")

    asyncio.run(scenario())


def test_the_heads_own_address() -> None:
    assert own_address(allocation(0, 1)) == "127.0.0.1"
    elsewhere = Allocation("--head 192.0.2.77", 2, 0, "192.0.2.77", 1)  # reserved for documentation
    with pytest.raises(AllocationError, match=r"192.0.2.77 .* not this machine, which is node 0"):
        own_address(elsewhere)
