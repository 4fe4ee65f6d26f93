"""Packs through the pipeline, in the lengths and numbers that Megatron-Core's schedules take."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_bridge.architecture import Architecture
from megatron_bridge.attention import AttentionPlan, plan_attention
from treepo.config.trainer import ParallelConfig
from treepo.learning.packing import Pack, blank_pack, padded


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A pack on the device. scored: int64 [N], the tokens whose log-probs are wanted."""

    pack: dict[str, Tensor]
    plan: AttentionPlan
    scored: Tensor


Forward = Callable[[MicroBatch, DistributedDataParallel], Tensor]
"""The last stage's scores of a micro-batch, the hidden states of any other stage."""


class Schedule:
    """Runs packs through the model's `chunks`, which are this rank's, and backwards where training."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        architecture: Architecture,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._chunks, self._parallel = chunks, parallel
        self._frequency, self._dtype, self._device = architecture.frequency, dtype, device

    def run(
        self,
        packs: Sequence[Pack],
        scored: Callable[[Pack], np.ndarray],
        forward: Forward,
        finish: Callable,
        train: bool,
    ) -> list:
        """On the last stage `finish(batch, scores)` is called for each pack: where training it returns the
        loss and what to collect, otherwise only the latter. Returns what was collected: nothing on the other
        stages. scored: bool [T], the tokens of a pack whose log-probs are wanted.
        """
        packs = self._filled_up(packs)
        if not packs:
            return []

        def forward_step(batches: Iterator[MicroBatch], chunk: DistributedDataParallel):
            batch = next(batches)

            def collect(scores: Tensor, non_loss_data: bool = False):
                if non_loss_data:
                    return finish(batch, scores)
                loss, collected = finish(batch, scores)
                tokens = torch.zeros((), dtype=torch.int, device=self._device)  # unused: no hidden mean
                return loss, tokens, collected

            return forward(batch, chunk), collect

        batches = (self._micro_batch(pack, scored(pack)) for pack in packs)
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=_for_each(len(self._chunks), batches),
            model=list(self._chunks),
            num_microbatches=len(packs),
            seq_length=1,  # unused: lengths vary and are sent along
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    def _filled_up(self, packs: Sequence[Pack]) -> list[Pack]:
        """The packs, and blank ones up to a number that the schedule takes.

        Replicas that share experts meet in every layer of every micro-batch: they have equally many.
        Interleaved stages work on as many micro-batches in turn as there are stages.
        """
        count = torch.tensor(len(packs), device=self._device)
        if self._parallel.expert > 1:
            dist.all_reduce(count, dist.ReduceOp.MAX, parallel_state.get_data_parallel_group())
        group = self._parallel.pipeline if len(self._chunks) > 1 else 1
        wanted = math.ceil(int(count) / group) * group
        return [*packs, *[blank_pack()] * (wanted - len(packs))]

    def _micro_batch(self, pack: Pack, scored: np.ndarray) -> MicroBatch:
        if self._parallel.sequence_parallel:  # every rank has equally many tokens
            pack = padded(pack, len(pack) + -len(pack) % self._parallel.tensor)
        plan = plan_attention(pack.exit, pack.position, self._frequency, self._dtype, self._device)
        # Copies: arrays that come from another process may be read-only, and tensors cannot be.
        tensors = {name: torch.tensor(column, device=self._device) for name, column in pack.columns().items()}
        return MicroBatch(tensors, plan, torch.from_numpy(np.flatnonzero(scored)).to(self._device))


def _for_each(readers: int, batches: Iterator[MicroBatch]) -> list[Iterator[MicroBatch]]:
    """Iterators that all give the same batches, each of which is dropped as soon as all have given it
    (itertools.tee keeps 57 at a time).
    """
    queues: list[deque[MicroBatch]] = [deque() for _ in range(readers)]

    def read(mine: deque[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            if not mine:
                batch = next(batches, None)
                if batch is None:
                    return
                for queue in queues:
                    queue.append(batch)
                del batch
            yield mine.popleft()

    return [read(queue) for queue in queues]
