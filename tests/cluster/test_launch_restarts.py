"""A launch whose Ray and job server are fakes: what a crash ends, and what follows it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.test_launch_parts import FakeNode, order
from treepo.cluster import launch as launch_module
from treepo.cluster import ray_address, ray_job, restarts, worker_node
from treepo.cluster.allocation import Cluster
from treepo.cluster.launch import launch
from treepo.cluster.placement import Node
from treepo.cluster.ray_node import free_ports
from treepo.cluster.schedulers import Allocation
from treepo.cluster.worker_node import take_part
from treepo.errors import ClusterError, LostJobError, StoppedJobError

DIES = "Ray on the head dies"


class Scene:
    """What happens in a launch; implements the parts of `JobServer` that a launch uses.

    outcomes: how each training ends: with an exit code, an error, or with the death of the head's Ray.
    events: in order. commands: of the trainings. said: the head's lines.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *outcomes: object) -> None:
        self.outcomes = list(outcomes)
        self.events: list[str] = []
        self.commands: list[str] = []
        self.said: list[str] = []
        self._head_ray = FakeNode()
        config = order("run.yaml").config.model_copy(update={"out": folder / "run"})
        self.spec = replace(order("run.yaml"), config=config, say=self.said.append, wait=20.0)
        for module in (restarts, worker_node):
            monkeypatch.setattr(module, "pause_seconds", lambda _: 0.01)
        monkeypatch.setattr(launch_module, "ray_head", self._start_head)
        monkeypatch.setattr(ray_job, "job_server", self._server)
        monkeypatch.setattr(ray_address, "check_job_server", lambda _: None)
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "no_proxy"):
            monkeypatch.setenv(name, "")  # a launch sets them for its process

    def launch(self) -> list[int]:
        """The exit codes of a head and a node."""
        (port,) = free_ports(1)
        head, node = (Allocation("a test", 2, rank, "127.0.0.1", port) for rank in (0, 1))

        async def scenario() -> list[int]:
            async with asyncio.timeout(60):
                there = take_part(node, self.spec, self._start_node)
                return list(await asyncio.gather(launch(head, self.spec), there))

        return asyncio.run(scenario())

    @asynccontextmanager
    async def _start_head(self, *_: object) -> AsyncIterator[FakeNode]:
        self._head_ray = FakeNode()
        self.events.append("head starts Ray")
        yield self._head_ray
        self.events.append("head ends Ray")

    @asynccontextmanager
    async def _start_node(self, *_: object) -> AsyncIterator[FakeNode]:
        self.events.append("node starts Ray")
        try:
            yield FakeNode()
        finally:
            self.events.append("node ends Ray")

    async def _server(self, *_: object) -> "Scene":
        return self

    async def nodes(self) -> list[Node]:
        running = sum(("starts" in event) - ("ends Ray" in event) for event in self.events)
        return [Node(str(index), "127.0.0.1", 64, 0) for index in range(running)]

    async def run(self, command: str, _write: Callable[[str], None]) -> int:
        self.commands.append(command)
        outcome = self.outcomes.pop(0)
        if outcome is DIES:
            self._head_ray.end.set()
            await asyncio.Event().wait()
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, int)
        return outcome

    async def end_job(self) -> None:
        self.events.append("the job ends")


@pytest.mark.parametrize("crash", [137, LostJobError("Ray lost the job"), DIES], ids=["137", "lost", "dies"])
def test_a_crash_ends_all_of_ray_and_another_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: object
) -> None:
    scene = Scene(tmp_path, monkeypatch, crash, 0)
    assert scene.launch() == [0, 0]
    assert len(scene.commands) == 2
    assert scene.events[:2] == ["head starts Ray", "node starts Ray"]
    assert sorted(scene.events) == sorted(
        2 * ["head starts Ray", "node starts Ray", "head ends Ray", "node ends Ray"]
    )
    head, node = ([event for event in scene.events if who in event] for who in ("head", "node"))
    assert head == 2 * ["head starts Ray", "head ends Ray"]
    assert node == 2 * ["node starts Ray", "node ends Ray"]
    assert scene.events[-1] == "head ends Ray", "the other nodes leave first"
    assert any("restart 1 of 3 in 0.01 s, from the beginning" in line for line in scene.said)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_is_stopped_or_never_begins_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, StoppedJobError("the job was stopped"))
    with pytest.raises(StoppedJobError):
        scene.launch()

    async def fails(*_: object) -> None:
        raise ClusterError("no answer")

    monkeypatch.setattr(ray_job, "job_server", fails)
    with pytest.raises(ClusterError, match="no answer"):
        scene.launch()


def test_in_a_cluster_that_runs_the_job_alone_is_ended_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, LostJobError("Ray lost the job"), ClusterError("it is refused"), 0)
    scene.events += ["the cluster starts"] * 2
    scene.spec = replace(scene.spec, resume=True)
    assert asyncio.run(launch(Cluster("10.0.0.1:6379", 1), scene.spec)) == 0
    assert scene.events[2:] == ["the job ends"] * 2
    assert [command.endswith("run.yaml --resume") for command in scene.commands] == [True] * 3
