"""Allocations of real Megatron-Core trainer ranks on CPU, part by part."""

import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.live_bytes import LiveBytes
from treepo.config.run import RunConfig
from treepo.config.trainer import ParallelConfig
from treepo.learning.packing import Pack

_SETTLE_SECONDS = 0.3


@dataclass(frozen=True)
class MemoryCase:
    """packs: of each replica, all alike. saves: name of the folder it also saves to, if any."""

    config: RunConfig
    packs: int = 2
    chunk_bytes: int = 1 << 29
    saves: str = ""


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank; all but the state are peaks.

    parameters: elements, by the names of the families' tables. kept: activations of all micro-batches in
    flight and their packs. logits, work: beyond `kept`, from logits to loss and back, and in the layers'
    backward pass. fullest: everything at once. joined: while weights are gathered for a sync. copied: while a
    checkpoint is begun. checkpoint, export: sizes of the written files.
    """

    parameters: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    gather_buffer: int
    kept: int
    logits: int
    work: int
    fullest: int
    joined: int
    copied: int
    checkpoint: int
    export: int


def chain(tokens: int) -> Pack:
    """One trajectory that fills the pack; all its tokens but the first are trained."""
    index = np.arange(tokens, dtype=np.int32)
    trained = np.ones(tokens)
    trained[0] = 0.0
    return Pack(
        token=index % 97,
        position=index,
        exit=np.full(tokens, tokens, dtype=np.int32),
        source=index - 1,
        advantage_pos=0.1 * trained,
        advantage_neg=-0.1 * trained,
        count_pos=trained,
        count_neg=trained,
        rollout_log_prob=np.zeros(tokens, dtype=np.float32),
        version=np.zeros(tokens, dtype=np.int32),
        tree=np.zeros(tokens, dtype=np.int32),
        segment=np.zeros(tokens, dtype=np.int32),
        offset=index,
        leaf_weight=1.0,
    )


def measure(case: MemoryCase, layout: ParallelConfig, rank: int, store, folder: Path) -> list[Measured]:
    """All ranks' memory, in their order, in the second step: the first one creates the optimizer state."""
    del layout
    from megatron_bridge import log_prob
    from megatron_bridge.trainer import MegatronTrainer

    log_prob.CHUNK_BYTES = case.chunk_bytes
    config, ranks = case.config, case.config.trainer.parallel.ranks
    trainer = MegatronTrainer(
        config.model.path, config.model.dtype, config.trainer, config.learning, rank, ranks, store
    )
    packs = [chain(config.trainer.max_tokens_per_pack)] * case.packs
    trainer.train_step(packs, 1.0, 1e3)
    live, sync = _Phases(), LiveBytes()
    with live.watching(trainer):
        trainer.train_step(packs, 1.0, 1e3)
    with sync:
        for _ in trainer.weight_source().rounds(1):
            pass
    written = _written(trainer, folder / case.saves) if case.saves else (0, 0, 0)
    everyone: list[Measured] = [_measured(trainer, live, sync, written)] * ranks
    torch.distributed.all_gather_object(everyone, everyone[0])
    trainer.close()
    return everyone


class _Phases(LiveBytes):
    """Peaks of a step's phases, each above the memory that was alive when it began and stays alive."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.logits = self.work = self.fullest = 0
        self._base = 0
        self._phase = "forward"

    @contextmanager
    def watching(self, trainer):
        from megatron_bridge import trainer as module

        finalize, handles = module.finalize_model_grads, []

        def layers_done(_norm, inputs: tuple[Tensor]) -> None:
            """The layers' output counts for the phase after them."""
            self._settle()
            base = self.live - inputs[0].untyped_storage().nbytes()
            self._begin("logits", base)
            inputs[0].register_hook(lambda _: self._begin("work", base))

        def sent_on(_decoder, _inputs, output: Tensor) -> None:
            output.register_hook(lambda gradient: self._begin("work", self.live - gradient.nbytes))

        def finished(chunks: list) -> None:
            self._begin("forward", 0)
            finalize(chunks)

        for chunk in trainer._model:
            decoder = chunk.module.decoder
            handles.append(decoder.register_forward_pre_hook(lambda *_: self._begin("forward", 0)))
            if chunk.module.post_process:
                handles.append(decoder.final_layernorm.register_forward_pre_hook(layers_done))
            else:
                handles.append(decoder.register_forward_hook(sent_on))
        module.finalize_model_grads = finished
        try:
            with self:
                yield
        finally:
            module.finalize_model_grads = finalize
            for handle in handles:
                handle.remove()

    def _settle(self) -> None:
        """Waits until memory is steady: gloo's threads hold what they sent until they get to free it."""
        seen = -1
        while seen != self.live:
            seen = self.live
            time.sleep(_SETTLE_SECONDS)

    def _begin(self, phase: str, base: int) -> None:
        self.fullest = max(self.fullest, self.peak)
        if self._phase != "forward":
            setattr(self, self._phase, max(getattr(self, self._phase), self.peak - self._base))
        self._phase, self._base = phase, base
        self.kept = max(self.kept, base)
        self.restart()


def _written(trainer, folder: Path) -> tuple[int, int, int]:
    """Bytes copied for a training checkpoint, and the sizes of its tensors and of an exported folder's."""
    copying = LiveBytes()
    with copying:
        trainer.save(folder / "checkpoint", {})
    trainer.finish_save()
    trainer.export(folder / "export")
    kinds = ("*.distcp", "*.safetensors")
    checkpoint, export = (sum(file.stat().st_size for file in folder.rglob(kind)) for kind in kinds)
    return copying.peak, checkpoint, export


def _measured(trainer, live: _Phases, sync: LiveBytes, written: tuple[int, int, int]) -> Measured:
    from megatron.core import parallel_state
    from megatron.core.optimizer import ChainedOptimizer

    from megatron_bridge.model import named_parameters

    named: dict[str, Any] = dict(named_parameters([chunk.module for chunk in trainer._model]))
    optimizer = trainer._optimizer
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    masters = [value for part in parts for group in part.optimizer.param_groups for value in group["params"]]
    state = [
        value
        for part in parts
        for values in part.optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    weights = _storages(named.values())
    buffers = parallel_state.get_global_memory_buffer().buffer.values()
    return Measured(
        {name: parameter.numel() for name, parameter in named.items()},
        sum(weights.values()),
        sum(_storages(each.main_grad for each in named.values() if each.requires_grad).values()),
        sum(size for key, size in _storages([*masters, *state]).items() if key not in weights),
        sum(_storages(buffers).values()),
        live.kept,
        live.logits,
        live.work,
        live.fullest,
        sync.peak,
        *written,
    )


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
