"""The order in which a training run starts, with fakes in place of Ray, trainer and engines."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from treepo.cluster import session, trainer_group
from treepo.cluster.session import training_session
from treepo.cluster.trainer_group import TrainerGroup
from treepo.config.run import RunConfig
from treepo.rollout.stopping import StopRule


def config_of(ranks: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "out": "unused",
            "steps": 1,
            "model": {"path": "unused"},
            "data": {"train": "unused"},
            "trainer": {"parallel": {"data": ranks}},
        }
    )


class Remote:
    """A Ray actor whose methods write their names and arguments to `events`."""

    def __init__(self, name: str, events: list[str]) -> None:
        self._name, self._events = name, events

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: object) -> Any:
            await asyncio.sleep(0)
            told = arguments[0] if method == "call" else method
            self._events.append(f"{self._name}: {told}")
            return ("host", 1) if method == "open_store" else None

        return SimpleNamespace(remote=call)


def test_ranks_are_built_before_they_are_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    names = iter(["rank 0", "rank 1"])
    actor = SimpleNamespace(
        options=lambda: SimpleNamespace(remote=lambda: Remote(next(names), events)),
    )
    monkeypatch.setattr(trainer_group.ray, "remote", lambda _: actor)
    asyncio.run(TrainerGroup(config_of(2), [{}, {}]).ready())
    assert events[0] == "rank 0: open_store"
    assert sorted(events[1:3]) == ["rank 0: build", "rank 1: build"]
    assert sorted(events[3:]) == ["rank 0: warm_up", "rank 1: warm_up"]


class FakeTrainer:
    def __init__(self, events: list[str]) -> None:
        self._events = events

    async def ready(self) -> None:
        self._events.append("trainer begins")
        await asyncio.sleep(0)
        self._events.append("trainer is ready")

    async def offload(self, weights: bool) -> None:
        assert weights
        self._events.append("trainer offloads")

    async def devices(self) -> list[str]:
        return ["0"]


class FakePool:
    def __init__(self, events: list[str]) -> None:
        self._events = events
        events.append("engines begin")

    async def ready(self) -> None:
        self._events.append("engines are ready")

    async def close(self) -> None:
        self._events.append("engines end")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[str]]:
    """Start and end a run whose engines share the trainer's devices, or do not; return what happened."""

    def run(shares_devices: bool) -> list[str]:
        events: list[str] = []
        reservation = SimpleNamespace(
            shares_devices=shares_devices, one_machine=True, ranks=(), engine_options=lambda _: []
        )

        async def reserve(*_: object) -> Any:
            return reservation

        def pool(*_: object, sampling_goes_on: bool) -> FakePool:
            assert not sampling_goes_on, "the loop is synchronous"
            return FakePool(events)

        monkeypatch.setattr(session, "watched_ray", lambda _: nullcontext())
        monkeypatch.setattr(session, "cluster_nodes", list)
        monkeypatch.setattr(session, "reserve", reserve)
        monkeypatch.setattr(session, "TrainerGroup", lambda *_: FakeTrainer(events))
        monkeypatch.setattr(session, "TrainingEnginePool", pool)

        async def main() -> None:
            async with training_session(config_of(), StopRule.__new__(StopRule)):
                events.append("run")

        asyncio.run(main())
        return events

    return run


def test_engines_that_share_devices_find_what_a_trainer_at_work_leaves(start) -> None:
    """They measure the free memory when they begin: the trainer has computed, and given back what it can."""
    assert start(True) == [
        "trainer begins",
        "trainer is ready",
        "trainer offloads",
        "engines begin",
        "engines are ready",
        "run",
        "engines end",
    ]


def test_engines_with_devices_of_their_own_start_beside_the_trainer(start) -> None:
    assert start(False) == [
        "engines begin",
        "engines are ready",
        "trainer begins",
        "trainer is ready",
        "run",
        "engines end",
    ]
