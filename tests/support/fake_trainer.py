"""A trainer and an engine pool that record the calls of the loop. The trainer can die at any of them."""

import asyncio
import random
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.fake_engine import FakeEngine
from treepo.errors import EngineError, LostTrainerError
from treepo.learning.mismatch import LogProbMismatch
from treepo.learning.packing import Pack
from treepo.learning.soundness import WeightCheck
from treepo.protocols import BatchResult, GenerateOutput, GenerateRequest, MiniBatch
from treepo.training.checkpoint_manifest import READY_TREES, CheckpointManifest


class FakeTrainer:
    """Implements `treepo.protocols.Trainer`; its log-probs are the engines'.

    As the real one does, `save` leaves a hidden folder, and `finish_save` names it. turns: of the event loop,
    while it trains. before: called with the name of each method before it does anything; after: once it is
    done, before the loop knows. If one of them raises LostTrainerError, so does every call until `restart`.
    learns: whether the number `weights` depends on every batch that was trained; else it stays 0. written:
    whether a checkpoint that was begun has reached the disk.
    """

    dtype = "float32"
    turns = 0
    learns = False
    written = True
    before: Callable[[str], None] = staticmethod(lambda _name: None)
    after: Callable[[str], None] = staticmethod(lambda _name: None)

    def __init__(self, events: list[str] | None = None) -> None:
        self.events = [] if events is None else events
        self.weights = 0
        self._lost: LostTrainerError | None = None
        self._pending: tuple[Path, Path] | None = None

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        if self._lost is not None:
            raise self._lost
        try:
            self.before(name)
            yield
            self.after(name)
        except LostTrainerError as error:
            self._lost = error
            raise

    async def restart(self) -> None:
        self.events.append("restart")
        self._lost, self._pending, self.weights = None, None, 0
        with self.call("restart"):
            pass

    async def log_probs(self, packs: Sequence[Sequence[Pack]], temperature: float) -> list[list[np.ndarray]]:
        del temperature
        with self.call("log_probs"):
            return [[pack.rollout_log_prob for pack in replica] for replica in packs]

    async def reference_log_probs(
        self, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]:
        """Half a nat below the engine's."""
        del temperature
        with self.call("reference_log_probs"):
            return [[pack.rollout_log_prob - np.float32(0.5) for pack in replica] for replica in packs]

    async def train_batch(self, mini_batches: Sequence[MiniBatch], temperature: float) -> BatchResult:
        del temperature
        with self.call("train_batch"):
            return await self._train(mini_batches)

    async def _train(self, mini_batches: Sequence[MiniBatch]) -> BatchResult:
        for turn in range(self.turns):
            if turn == self.turns // 2:
                self.before("half of train_batch")
            await asyncio.sleep(0)
        self.events.append(f"train {len(mini_batches)}")
        if self.learns:
            for pack in (pack for one in mini_batches for replica in one.packs for pack in replica):
                for column in (pack.token, pack.advantage_pos, pack.advantage_neg):
                    self.weights = zlib.crc32(column.tobytes(), self.weights)
        updates = [{"loss": 0.0, "grad_norm": 1.0, "learning_rate": 1e-6}] * len(mini_batches)
        seconds = {"log_probs": 3.0, "train": 5.0}
        return BatchResult(
            updates, LogProbMismatch(2.0, 4.0, 1.5), seconds, WeightCheck(1.0, -0.5, -0.5, 100)
        )

    async def save(self, folder: Path, run: Mapping[str, Any], ready_trees: bytes) -> None:
        with self.call("save"):
            partial = folder.with_name(f".{folder.name}.partial")
            partial.mkdir(parents=True)
            (partial / READY_TREES).write_bytes(ready_trees)
            (partial / "weights").write_text(str(self.weights))
            CheckpointManifest("float32", True, run["steps_done"], {}, run).write(partial)
            self._pending = partial, folder

    async def save_written(self) -> bool:
        with self.call("save_written"):
            return self.written

    async def finish_save(self) -> None:
        with self.call("finish_save"):
            assert self._pending is not None
            self._pending[0].rename(self._pending[1])

    async def load(self, folder: Path) -> None:
        with self.call("load"):
            self.events.append(f"load {folder.name}")
            self.weights = int((folder / "weights").read_text())

    async def export(self, folder: Path) -> None:
        with self.call("export"):
            self.events.append(f"export {folder.name}")


@dataclass
class NamedEngine(FakeEngine):
    """An engine of `FakePool`. While it is shut for some reason, it interrupts requests and lets none in.

    pace: most turns of the event loop for one token, drawn from `shuffle` and the request's seed; 0: all
    tokens take one turn. stalls: whether a request gets no further token yet. weights: of the trainer; what
    it samples depends on them. refuses: whether its weights are of several versions.
    """

    name: str = "engine 0"
    status: str = "serving"
    pace: int = 0
    stalls: Callable[[GenerateRequest], bool] = lambda _request: False
    weights: int = 0
    refuses: bool = False
    _shut: set[str] = field(default_factory=set)
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        while self._shut:
            await self._open.wait()
        if self.refuses:
            raise EngineError("its weights are incomplete")
        if not self.pace:
            return await super().generate(request)
        self.requests.append(request)
        number = len(self.requests)
        self.running += 1
        try:
            output = self.answer(request)
            done = await self._decode(request, len(output.tokens))
        finally:
            self.running -= 1
        if self.fails(number, request):
            raise EngineError("the fake engine fails on purpose")
        if done == len(output.tokens):
            return output
        return replace(
            output, tokens=output.tokens[:done], log_probs=output.log_probs[:done], finish="interrupted"
        )

    def draw(self, request: GenerateRequest) -> tuple[np.ndarray, np.ndarray]:
        return super().draw(replace(request, seed=request.seed ^ self.weights))

    async def shut(self, reason: str) -> None:
        """Interrupt all requests, and return when none is inside."""
        self._shut.add(reason)
        self._open.clear()
        while self.running:
            await asyncio.sleep(0)

    @property
    def open(self) -> bool:
        return not self._shut

    def reopen(self, reason: str) -> None:
        self._shut.remove(reason)
        if not self._shut:
            self._open.set()

    async def _decode(self, request: GenerateRequest, tokens: int) -> int:
        """The number of tokens after which the request ends, or is interrupted."""
        turns = random.Random(request.seed + (self.shuffle or 0))
        for done in range(1, tokens + 1):
            for _ in range(turns.randrange(self.pace + 1)):
                await asyncio.sleep(0)
            while self.stalls(request) and not self._shut:
                await asyncio.sleep(0)
            if self._shut:
                return done
        return tokens


class FakePool:
    """Implements `treepo.protocols.TrainingEnginePool`; its engines serve the version they were given last.

    sampling_goes_on: while the trainer computes, as in an asynchronous run; else the engines are held.
    trainer: whose weights they get. If it is lost meanwhile, they stay as they are.
    """

    kv_tokens = None

    def __init__(
        self,
        engine: NamedEngine,
        events: list[str],
        *others: NamedEngine,
        sampling_goes_on: bool = False,
        trainer: FakeTrainer | None = None,
    ) -> None:
        self.engines = (engine, *others)
        self._trainer = trainer or FakeTrainer(events)
        self._events = events
        self._sampling_goes_on = sampling_goes_on
        self._training = False

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        assert not self._training
        self._training = True
        try:
            if self._sampling_goes_on:
                yield
            else:
                self._events.append("hold")
                async with self._shut("held"):
                    yield
                self._events.append("release")
        finally:
            self._training = False

    @asynccontextmanager
    async def restarted_trainer(self) -> AsyncIterator[None]:
        assert not self._training
        await self._trainer.restart()
        async with self.training():
            yield
        assert self.engines[0].open

    async def sync_weights(self, version: int) -> None:
        assert self._training
        async with self._shut("updating"):
            self._events.append(f"sync {version}")
            for engine in self.engines:
                engine.refuses = True
            try:
                for _ in self.engines:
                    with self._trainer.call("send_weights"):
                        await asyncio.sleep(0)
            except LostTrainerError:
                for engine in self.engines:
                    engine.reopen("updating")
                raise
            for engine in self.engines:
                engine.version, engine.weights, engine.refuses = version, self._trainer.weights, False

    @asynccontextmanager
    async def _shut(self, reason: str) -> AsyncIterator[None]:
        for engine in self.engines:
            await engine.shut(reason)
        yield
        for engine in self.engines:
            assert engine.running == 0
            engine.reopen(reason)
