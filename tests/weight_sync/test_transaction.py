"""The weight transaction over real transports, with engines that fail at every stage."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.weight_sinks import FakeSink
from treepo.config.weights import WeightsConfig
from treepo.errors import EngineError
from treepo.weight_sync import transaction
from treepo.weight_sync.lanes import LocalSource
from treepo.weight_sync.send import Outcome, WeightStream, open_sender
from treepo.weight_sync.transaction import update_weights
from treepo.weight_sync.wire import Manifest, Remark, TensorInfo

# `broadcast` differs from `host_broadcast` only in the device of the buffers (test_transport.py has both).
TRANSPORTS = ("colocated", "host_broadcast", "disk")
TENSORS = 6  # each a bucket of its own
STAGES = ("begin", "join", 0, TENSORS // 2, TENSORS - 1, "commit")
SECONDS = 3.0  # after which a broken broadcast ends


class FakeEngine:
    """Implements `ReceivingEngine`. serves: a version, or None if it refuses requests. fault: called at each
    stage ("begin", "join", the number of a bucket, "commit"); what it raises is the engine's error.
    """

    def __init__(self, name: str) -> None:
        self.name, self.serves = name, 0
        self.fault: Callable[[str | int], None] = lambda _: None
        self._sink = FakeSink(name, fault=self._at)
        self._dirty = False

    def sink(self) -> FakeSink:
        return self._sink

    async def begin(self, version: int, manifest: Manifest) -> None:
        self._at("begin")
        self._announced, self._version = manifest, version
        self._sink.forget()

    async def commit(self) -> None:
        self._at("commit")
        assert set(self._sink.received[0]) == {info.name for info in self._announced}
        self.serves, self._dirty = self._version, False

    async def abort(self, reason: str) -> None:
        del reason
        if self._dirty:
            self.serves = None

    def close(self) -> None:
        self._sink.close()

    def _at(self, stage: str | int) -> None:
        self.fault(stage)
        self._dirty = self._dirty or isinstance(stage, int)


class FakeTrainer:
    """Sends `TENSORS` tensors that tell the version by their values; fails before tensor `fails_at`."""

    def __init__(self, stream: WeightStream) -> None:
        self._stream = stream
        self.fails_at: int | None = None

    async def manifest(self) -> Manifest:
        return tuple(TensorInfo(f"t{index}", "float32", (5,)) for index in range(TENSORS))

    async def send_weights(self, version: int, sinks: Sequence[Any]) -> Outcome:
        return await asyncio.to_thread(
            self._stream.send, LocalSource(self._tensors(version), await self.manifest()), version, sinks
        )

    async def release_cache(self) -> None: ...

    def _tensors(self, version: int) -> Iterator[tuple[str, Tensor]]:
        for index in range(TENSORS):
            if index == self.fails_at:
                raise RuntimeError("a rank of the trainer is gone")
            yield f"t{index}", torch.full((5,), 10.0 * version + index)


@pytest.fixture(params=TRANSPORTS)
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeTrainer]:
    config = WeightsConfig(transport=request.param)
    stream = WeightStream(open_sender(config, tmp_path, "127.0.0.1", SECONDS), 20, SECONDS)
    yield FakeTrainer(stream)
    stream.close()


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    made = [FakeEngine(f"engine {index}") for index in range(3)]
    yield made
    for engine in made:
        engine.close()


def update(
    trainer: FakeTrainer, engines: Sequence[FakeEngine], version: int
) -> dict[FakeEngine, EngineError]:
    return asyncio.run(update_weights(trainer, engines, version, SECONDS))


def assert_serves(engine: FakeEngine, version: int) -> None:
    assert engine.serves == version
    for index in range(TENSORS):
        assert engine.sink().received[0][f"t{index}"].tolist() == [10.0 * version + index] * 5


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_fails_is_left_out_and_the_others_commit(
    trainer: FakeTrainer, engines: list[FakeEngine], stage: str | int
) -> None:
    """It takes part again once it has recovered."""

    def fail(at: str | int) -> None:
        if at == stage:
            raise EngineError("a fault")

    engines[1].fault = fail
    failed = update(trainer, engines, version=1)
    assert list(failed) == [engines[1]]
    assert "a fault" in str(failed[engines[1]])
    assert engines[1].serves != 1, "it has not all weights of version 1"
    assert_serves(engines[0], 1)
    assert_serves(engines[2], 1)
    engines[1].fault = lambda _: None
    assert update(trainer, engines, version=2) == {}
    for engine in engines:
        assert_serves(engine, 2)


def test_if_all_engines_fail_the_update_fails_and_none_serves_it(
    trainer: FakeTrainer, engines: list[FakeEngine]
) -> None:
    def fail(at: str | int) -> None:
        if at == 1:
            raise EngineError("a fault")

    for engine in engines:
        engine.fault = fail
    with pytest.raises(EngineError, match=r"no engine took the weights of version 1: engine 0: a fault"):
        update(trainer, engines, version=1)
    assert [engine.serves for engine in engines] == [None] * 3


@pytest.mark.parametrize("fails_at", [0, TENSORS - 1])
def test_if_the_trainer_fails_no_engine_serves_a_mixture(
    trainer: FakeTrainer, engines: list[FakeEngine], fails_at: int
) -> None:
    trainer.fails_at = fails_at
    with pytest.raises(RuntimeError, match="a rank of the trainer is gone"):
        update(trainer, engines, version=1)
    assert {engine.serves for engine in engines} == ({0} if fails_at == 0 else {None})


def test_an_engine_that_does_not_answer_does_not_hold_up_the_others(
    trainer: FakeTrainer, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "GRACE_SECONDS", 0.0)

    async def silent(version: int, manifest: Manifest) -> None:  # noqa: ARG001  as of every engine
        await asyncio.get_running_loop().create_future()

    engines[2].begin = silent  # type: ignore[method-assign]
    failed = update(trainer, engines, version=1)
    assert list(failed) == [engines[2]]
    assert "no answer within" in str(failed[engines[2]])
    assert_serves(engines[0], 1)
    assert_serves(engines[1], 1)


def test_what_the_transport_remarks_is_in_the_runs_log(
    trainer: FakeTrainer, engines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray does not forward the log of the sending rank's process."""
    send = trainer.send_weights

    async def remarking(version: int, sinks: Sequence[Any]) -> Outcome:
        outcome = await send(version, sinks)
        return replace(outcome, remarks=[Remark(logging.WARNING, "100% through host memory")])

    monkeypatch.setattr(trainer, "send_weights", remarking)
    update(trainer, engines, 1)
    assert caplog.record_tuples == [
        ("treepo.weight_sync.transaction", logging.WARNING, "100% through host memory")
    ]
