"""Runs packs through the pipeline, in lengths and numbers that Megatron-Core's schedules accept."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """A pack on the device. wanted: int64 [N], the tokens whose log-probs are computed."""

    pack: dict[str, Tensor]
    plan: AttentionPlan
    wanted: Tensor


Forward = Callable[[MicroBatch, DistributedDataParallel], Tensor]
"""Returns the last stage's outputs for a micro-batch, and the hidden states of any other stage."""


class Schedule:
    """Runs packs through this rank's model `chunks`, forwards and, in training, backwards."""

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

    def filled_up(self, packs: Sequence[Pack]) -> list[Pack]:
        """Append blank packs up to a number that the pipeline schedule accepts. Collective.

        Replicas that share experts communicate in every layer of every micro-batch, so they need equal
        numbers. Interleaved stages process micro-batches in groups as large as the pipeline.
        """
        count = torch.tensor(len(packs), device=self._device)
        if self._parallel.expert > 1:
            dist.all_reduce(count, dist.ReduceOp.MAX, parallel_state.get_data_parallel_group())
        group = self._parallel.pipeline if len(self._chunks) > 1 else 1
        number = math.ceil(int(count) / group) * group
        return [*packs, *[blank_pack()] * (number - len(packs))]

    def prepare(self, pack: Pack, wanted: np.ndarray) -> MicroBatch:
        """Move a pack to the device and plan its attention. wanted: bool [T], the tokens whose log-probs are
        computed.
        """
        if self._parallel.sequence_parallel:  # tensor-parallel ranks hold equal numbers of tokens
            pack = padded(pack, len(pack) + -len(pack) % self._parallel.tensor)
        plan = plan_attention(pack.exit, pack.position, self._frequency, self._dtype, self._device)
        # Copies: arrays from another process may be read-only, and tensors cannot be.
        tensors = {name: torch.tensor(column, device=self._device) for name, column in pack.columns().items()}
        return MicroBatch(tensors, plan, torch.from_numpy(np.flatnonzero(wanted)).to(self._device))

    def run(
        self,
        batches: Iterable[MicroBatch],
        number: int,
        forward: Forward,
        finish: Callable,
        train: bool,
    ) -> list:
        """Run `number` micro-batches, made of `filled_up` packs. Collective.

        On the last stage `finish(batch, outputs)` is called for each: in training it returns the loss and
        what to collect, else only what to collect. Returns what was collected, in order; nothing on the other
        stages.
        """
        if not number:
            return []

        def forward_step(batches: Iterator[MicroBatch], chunk: DistributedDataParallel):
            batch = next(batches)

            def collect(outputs: Tensor, non_loss_data: bool = False):
                if non_loss_data:
                    return finish(batch, outputs)
                loss, collected = finish(batch, outputs)
                tokens = torch.zeros((), dtype=torch.int, device=self._device)  # unused: no hidden mean
                return loss, tokens, collected

            return forward(batch, chunk), collect

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=_for_each(len(self._chunks), iter(batches)),
            model=list(self._chunks),
            num_microbatches=number,
            seq_length=1,  # unused: lengths vary and are sent along
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )


def _for_each(readers: int, batches: Iterator[MicroBatch]) -> list[Iterator[MicroBatch]]:
    """Make iterators over the same batches. A batch is dropped as soon as all of them have yielded it;
    itertools.tee would keep 57 at a time.
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
