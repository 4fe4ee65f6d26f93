"""The rendezvous of a launch's nodes at the head, over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from treepo.cluster.ray_node import free_ports
from treepo.cluster.rendezvous import RayAddress, Rendezvous, join, open_rendezvous, own_address
from treepo.cluster.schedulers import Allocation
from treepo.errors import AllocationError, ClusterError

RAY = RayAddress("10.0.0.1:6379", {"RAY_AUTH_TOKEN": "secret"})
SECONDS = 20.0


def allocation(rank: int, port: int, nodes: int = 3) -> Allocation:
    return Allocation("a test", nodes, rank, "127.0.0.1", port)


@asynccontextmanager
async def head(lost: list[int]) -> AsyncIterator[tuple[Rendezvous, int]]:
    (port,) = free_ports(1)
    async with open_rendezvous(allocation(0, port), "127.0.0.1", "same", lost.append) as rendezvous:
        yield rendezvous, port


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def test_every_node_learns_where_ray_is_and_how_it_ended() -> None:
    async def scenario() -> None:
        lost: list[int] = []
        async with head(lost) as (rendezvous, port):
            assert rendezvous.missing() == [1, 2]
            early = await join(allocation(2, port), "same", SECONDS)
            await until(lambda: rendezvous.missing() == [1])
            rendezvous.announce(RAY)
            late = await join(allocation(1, port), "same", SECONDS)
            assert await early.next() == await late.next() == RAY
            assert early.host == rendezvous.connected[2] == "127.0.0.1"
            ending = asyncio.create_task(rendezvous.end(7))
            assert await early.next() == await late.next() == 7
            early.close()
            await asyncio.sleep(0)
            assert not ending.done(), "it waits until all have left"
            late.close()
            await ending
        assert lost == []

    asyncio.run(scenario())


def test_a_node_that_does_not_belong_is_refused() -> None:
    async def scenario() -> None:
        async with head([]) as (rendezvous, port):
            first = await join(allocation(1, port), "same", SECONDS)
            await until(lambda: rendezvous.missing() == [2])
            for stranger, config, reason in (
                (allocation(1, port), "same", "node 1 is already connected, from 127.0.0.1"),
                (allocation(2, port), "other", "launches another configuration"),
                (allocation(2, port, nodes=4), "same", "another number of nodes"),
            ):
                connection = await join(stranger, config, SECONDS)
                with pytest.raises(AllocationError, match=reason):
                    await connection.next()
                connection.close()
            for noise in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 2}\n', b"x" * 100_000 + b"\n", b""):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(noise)
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
            assert rendezvous.missing() == [2]
            first.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "line",
    [
        b'{"rank": [1], "nodes": 3, "config": "same"}',
        b'{"rank": true, "nodes": 3, "config": "same"}',
        b'{"rank": 0, "nodes": 3, "config": "same"}',
        b'{"rank": 3, "nodes": 3, "config": "same"}',
        b'{"rank": 1e999, "nodes": 3, "config": "same"}',
        b'{"rank": 1, "nodes": "3", "config": "same"}',
        b"[" * 60_000,
        b"GET / HTTP/1.1",
    ],
)
def test_a_message_that_no_node_sends_ends_its_connection(line: bytes) -> None:
    async def scenario() -> None:
        lost: list[int] = []
        async with head(lost) as (rendezvous, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(line + b"\n")
            assert await reader.read() == b""
            assert rendezvous.missing() == [1, 2]
            writer.close()
        assert lost == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "line",
    [
        b'{"address": "10.0.0.1:6379", "secrets": {"TOKEN": "a\\u0000b"}}',
        b'{"address": "10.0.0.1:6379", "secrets": {"TOKEN": "\\ud800"}}',
        b'{"address": "10.0.0.1:6379", "secrets": []}',
        b'{"address": [], "secrets": {}}',
        b'{"exit": 1e999}',
        b'{"exit": null}',
    ],
)
def test_a_head_that_says_what_no_environment_can_hold_is_an_error(line: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(line + b"\n")
        await reader.read()
        writer.close()

    async def scenario() -> None:
        (port,) = free_ports(1)
        server = await asyncio.start_server(answer, "127.0.0.1", port)
        connection = await join(allocation(1, port), "same", SECONDS)
        with pytest.raises(AllocationError, match="is not a launch's head"):
            await connection.next()
        connection.close()
        server.close()

    asyncio.run(scenario())


def test_a_node_that_is_lost_is_reported_and_may_come_back() -> None:
    async def scenario() -> None:
        lost: list[int] = []
        async with head(lost) as (rendezvous, port):
            (await join(allocation(2, port), "same", SECONDS)).close()
            await until(lambda: lost == [2])
            assert rendezvous.missing() == [1, 2]
            again = await join(allocation(2, port), "same", SECONDS)
            await until(lambda: rendezvous.missing() == [1])
            again.close()

    asyncio.run(scenario())


def test_a_head_that_is_gone_or_never_listens() -> None:
    async def scenario() -> None:
        (port,) = free_ports(1)
        with pytest.raises(ClusterError, match=rf"no head at 127.0.0.1:{port} within 0.1 s: "):
            await join(allocation(1, port), "same", 0.1)

        async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.close()

        async with await asyncio.start_server(die, "127.0.0.1", port):
            connection = await join(allocation(1, port), "same", SECONDS)
            with pytest.raises(ClusterError, match="is gone and did not say"):
                await connection.next()
            connection.close()

    asyncio.run(scenario())


def test_a_taken_port_is_an_error() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(AllocationError, match=f"port {port}: .* another launch"):
                async with open_rendezvous(allocation(0, port), "127.0.0.1", "same", print):
                    raise AssertionError("it listens on a taken port")

    asyncio.run(scenario())


def test_the_heads_own_address() -> None:
    assert own_address(allocation(0, 1)) == "127.0.0.1"
    elsewhere = Allocation("--head 192.0.2.77", 2, 0, "192.0.2.77", 1)  # reserved for documentation
    with pytest.raises(AllocationError, match=r"192.0.2.77 .* not this machine, which is node 0"):
        own_address(elsewhere)
