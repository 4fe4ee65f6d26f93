"""A node of a launch that loses its Ray or its head: a real rendezvous on loopback, and a fake Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.test_launch_parts import FakeNode, order
from treepo.cluster import worker_node
from treepo.cluster.join import Connection
from treepo.cluster.launch_key import shared_key
from treepo.cluster.launch_parts import Launch
from treepo.cluster.ray_node import free_ports
from treepo.cluster.rendezvous import Rendezvous, open_rendezvous
from treepo.cluster.schedulers import Allocation
from treepo.cluster.worker_node import take_part
from treepo.errors import ClusterError

SECONDS = 20.0


class Scene:
    """A head that can die and come again, and one node with a fake Ray.

    rays: the Rays that the node has started, with their addresses; running: those that it has not stopped.
    """

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int = 3) -> None:
        monkeypatch.setattr(worker_node, "pause_seconds", lambda _: 0.01)
        (port,) = free_ports(1)
        self.said: list[str] = []
        self.rays: list[tuple[str, FakeNode]] = []
        self.running: set[FakeNode] = set()
        spec = order("run.yaml")
        config = spec.config.model_copy(update={"out": out / "run"})
        self.spec: Launch = replace(
            spec, config=config, say=self.said.append, wait=SECONDS, max_restarts=max_restarts
        )
        self.head_node, self.node = (Allocation("a test", 2, rank, "127.0.0.1", port) for rank in (0, 1))

    @asynccontextmanager
    async def start(self, connection: Connection, address: str) -> AsyncIterator[FakeNode]:
        assert connection.secrets == {"RAY_AUTH_TOKEN": "secret"}
        node = FakeNode()
        self.rays.append((address, node))
        self.running.add(node)
        try:
            yield node
        finally:
            self.running.remove(node)

    def node_task(self) -> "asyncio.Task[int]":
        return asyncio.create_task(take_part(self.node, self.spec, self.start))

    async def head(self, stack: AsyncExitStack) -> Rendezvous:
        key = stack.enter_context(shared_key(self.spec.config.out, {"RAY_AUTH_TOKEN": "secret"}))
        rendezvous = Rendezvous(2, self.spec.fingerprint(), key, lambda *_: None)
        await stack.enter_async_context(open_rendezvous(self.head_node, "127.0.0.1", rendezvous))
        return rendezvous


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def kill(rendezvous: Rendezvous) -> None:
    """Break the head's connections, as its death does."""
    for node in rendezvous._there.values():
        node.writer.transport.abort()


def test_a_node_starts_its_own_ray_again_and_follows_the_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            head = await scene.head(stack)
            node = scene.node_task()
            head.announce("10.0.0.1:1")
            await until(lambda: len(scene.rays) == 1)
            scene.rays[0][1].end.set()
            await until(lambda: len(scene.rays) == 2)
            assert len(scene.running) == 1
            head.announce(None)
            await until(lambda: not scene.running)
            head.announce("10.0.0.1:2")
            await until(lambda: len(scene.rays) == 3)
            await head.end(137)
            assert await node == 137

    asyncio.run(scenario())
    assert not scene.running
    assert [address for address, _ in scene.rays] == ["10.0.0.1:1", "10.0.0.1:1", "10.0.0.1:2"]
    assert "Ray on this node: it ended; restart 1 of 3 in 0.01 s" in scene.said
    assert scene.said[-1] == "the head has ended with exit code 137"


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_a_ray_that_does_not_stay_ends_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int
) -> None:
    scene = Scene(tmp_path, monkeypatch, max_restarts)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            head = await scene.head(stack)
            node = scene.node_task()
            head.announce("10.0.0.1:1")
            for count in range(1, max_restarts + 2):
                await until(lambda count=count: len(scene.rays) == count)
                scene.rays[-1][1].end.set()
            with pytest.raises(ClusterError, match=r"^Ray on this node: it ended$"):
                await node
            await until(lambda: head.missing() == [1])

    asyncio.run(scenario())
    assert not scene.running


def test_a_node_waits_for_a_head_that_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            head = await scene.head(stack)
            node = scene.node_task()
            head.announce("10.0.0.1:1")
            await until(lambda: len(scene.rays) == 1)
            kill(head)
        await until(lambda: not scene.running)
        async with AsyncExitStack() as stack:
            head = await scene.head(stack)
            head.announce("10.0.0.1:2")
            await until(lambda: len(scene.rays) == 2)
            await head.end(0)
            assert await node == 0

    asyncio.run(scenario())
    assert "did not say how the launch ended; waits up to 20 s for it" in "\n".join(scene.said)


def test_without_restarts_or_another_head_the_node_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(scene: Scene, reason: str) -> None:
        async with AsyncExitStack() as stack:
            head = await scene.head(stack)
            node = scene.node_task()
            await until(lambda: not head.missing())
            kill(head)
        with pytest.raises(ClusterError, match=reason) as caught:
            await node
        assert caught.value.exit_code == 1

    asyncio.run(scenario(Scene(tmp_path, monkeypatch, max_restarts=0), "is gone and did not say"))
    scene = Scene(tmp_path, monkeypatch)
    scene.spec = replace(scene.spec, wait=1.0)
    asyncio.run(scenario(scene, "no head at .* within 1 s"))


def test_a_launch_that_ends_before_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            head = await scene.head(stack)
            node = scene.node_task()
            await until(lambda: not head.missing())
            await head.end(2)
            assert await node == 2

    asyncio.run(scenario())
    assert scene.said[-1] == ("the head ended with exit code 2 before anything began; its output says why")
