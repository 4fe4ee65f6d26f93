"""A trainer that learns nothing and an engine pool; both record the calls of the loop."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.fake_engine import FakeEngine
from treepo.learning.mismatch import LogProbMismatch
from treepo.learning.packing import Pack
from treepo.protocols import BatchResult, MiniBatch
from treepo.training.checkpoint_manifest import READY_TREES, CheckpointManifest


class FakeTrainer:
    """Implements `treepo.protocols.Trainer`; its log-probs are the engines'.

    As the real one does, `save` leaves a hidden folder, and `finish_save` names it.
    """

    dtype = "float32"

    def __init__(self, events: list[str] | None = None) -> None:
        self.events = [] if events is None else events
        self._pending: tuple[Path, Path] | None = None

    async def log_probs(self, packs: Sequence[Sequence[Pack]], temperature: float) -> list[list[np.ndarray]]:
        del temperature
        return [[pack.rollout_log_prob for pack in replica] for replica in packs]

    async def train_batch(self, mini_batches: Sequence[MiniBatch], temperature: float) -> BatchResult:
        del temperature
        self.events.append(f"train {len(mini_batches)}")
        updates = [{"loss": 0.0, "grad_norm": 1.0}] * len(mini_batches)
        return BatchResult(updates, LogProbMismatch(2.0, 4.0, 1.5), {"log_probs": 3.0, "train": 5.0})

    async def save(self, folder: Path, run: Mapping[str, Any], ready_trees: bytes) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True)
        (partial / READY_TREES).write_bytes(ready_trees)
        CheckpointManifest("float32", True, run["steps_done"], {}, run).write(partial)
        self._pending = partial, folder

    async def finish_save(self) -> None:
        assert self._pending is not None
        self._pending[0].rename(self._pending[1])

    async def load(self, folder: Path) -> None:
        self.events.append(f"load {folder.name}")

    async def export(self, folder: Path) -> None:
        self.events.append(f"export {folder.name}")


class NamedEngine(FakeEngine):
    name = "engine 0"
    status = "serving"


class FakePool:
    """Implements `treepo.protocols.TrainingEnginePool`; its engine serves the version it was given last."""

    kv_tokens = None

    def __init__(self, engine: NamedEngine, events: list[str]) -> None:
        self.engines = (engine,)
        self._events = events
        self._training = False

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        assert not self._training
        self._training = True
        self._events.append("offload")
        yield
        self._events.append("reload")
        self._training = False

    async def sync_weights(self, version: int) -> None:
        assert self._training
        assert self.engines[0].running == 0
        self._events.append(f"sync {version}")
        self.engines[0].version = version
