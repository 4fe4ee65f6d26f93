"""Runs packs through the pipeline, in lengths and numbers that Megatron-Core's schedules accept."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_bridge.architecture import Architecture
from megatron_bridge.attention import CPU_BLOCK, CUDA_BLOCK, AttentionPlan, Slices, plan_attention
from megatron_bridge.routing_replay import RoutingReplay
from treepo.config.trainer import ParallelConfig
from treepo.learning.packing import Pack, blank_pack, padded
from treepo.learning.slicing import block_size, pack_slices, sliced_length

_COLUMNS = (
    *("token", "source", "exit", "position", "advantage_pos", "advantage_neg", "count_pos", "count_neg"),
    *("offset", "rollout_log_prob", "old_log_prob", "reference_log_prob"),
)
"""The columns of a pack that the forward pass, the attention and the loss read."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A pack on the device of one rank.

    pack: the columns of all its tokens, without those of the plan. token: int32 [T / context], of this rank's
    slice. wanted: int64 [N], the tokens whose log-probs this rank computes, because its slice has the tokens
    that predict them. source: int64 [N], the places of those in the slice.
    """

    pack: dict[str, Tensor]
    plan: AttentionPlan
    token: Tensor
    wanted: Tensor
    source: Tensor

    def without_routes(self) -> "MicroBatch":
        """The same tensors for a pass in which routers choose the experts, and nothing is recorded."""
        return replace(self, plan=replace(self.plan, routes=None))


Forward = Callable[[MicroBatch, DistributedDataParallel], Tensor]
"""Returns the last stage's outputs for a micro-batch, and the hidden states of any other stage."""


class Schedule:
    """Runs packs through this rank's model `chunks`, forwards and, in training, backwards.

    replay: of their routers; None if they always choose.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        architecture: Architecture,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        device: torch.device,
        replay: RoutingReplay | None = None,
    ) -> None:
        self._chunks, self._parallel, self._replay = chunks, parallel, replay
        self._frequency, self._dtype, self._device = architecture.frequency.to(device), dtype, device
        # FlexAttention computes whole blocks.
        self._blocks = (CUDA_BLOCK, CUDA_BLOCK) if device.type == "cuda" else (1, CPU_BLOCK)

    def filled_up(self, packs: Sequence[Pack]) -> list[Pack]:
        """Append blank packs up to a number that the pipeline schedule accepts. Collective.

        Replicas that share experts communicate in every layer of every micro-batch, so they need equal
        numbers. Every replica needs one, whose backward pass sums the gradients. Interleaved stages process
        micro-batches in groups as large as the pipeline.
        """
        count = max(1, len(packs))
        if self._parallel.expert > 1:
            most = torch.tensor(count, device=self._device)
            dist.all_reduce(most, dist.ReduceOp.MAX, parallel_state.get_data_parallel_group())
            count = int(most)
        group = self._parallel.pipeline if len(self._chunks) > 1 else 1
        number = math.ceil(count / group) * group
        return [*packs, *[blank_pack()] * (number - len(packs))]

    def prepare(self, pack: Pack, wanted: np.ndarray, *, replay: bool = True) -> MicroBatch:
        """Move a pack to the device and plan its attention. wanted: bool [T], the tokens whose log-probs are
        computed. replay: whether its routers replay routes, if this trainer's do.
        """
        pack, own, gathered = self._sliced(pack)
        columns = {name: getattr(pack, name) for name in _COLUMNS if getattr(pack, name) is not None}
        routing = self._replay if replay else None
        replayed = {} if routing is None else routing.arrays(pack, own)
        local = _predicted(pack.source, own, wanted)
        if self._parallel.context > 1:
            local |= {"own": own, "gathered": gathered}
        tensors = to_device(columns | local | replayed, self._device)
        token, slices = tensors["token"], None
        if self._parallel.context > 1:
            group = parallel_state.get_context_parallel_group()
            assert isinstance(group, dist.ProcessGroup)  # Megatron-Core types it as a rank too
            slices = Slices(tensors.pop("own"), tensors.pop("gathered"), group)
            token = token.index_select(0, slices.own)
        plan = plan_attention(
            *(tensors.pop("exit"), tensors.pop("position"), self._frequency, self._dtype), slices
        )
        if routing is not None:
            plan = replace(plan, routes=routing.routes({name: tensors.pop(name) for name in replayed}))
        return MicroBatch(
            plan=plan,
            token=token,
            wanted=tensors.pop("wanted"),
            source=tensors.pop("place"),
            pack=tensors,
        )

    def _sliced(self, pack: Pack) -> tuple[Pack, np.ndarray, np.ndarray]:
        """The pack, padded so that its slices are equally long; this rank's slice; and all slices one after
        another.
        """
        context = self._parallel.context
        block = block_size(len(pack), context, *self._blocks)
        pack = padded(pack, sliced_length(len(pack), context, block, self._parallel.sequence_multiple))
        slices = pack_slices(pack.position, context, block)
        return pack, slices[parallel_state.get_context_parallel_rank()], slices.reshape(-1)

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


def _predicted(source_T: np.ndarray, own: np.ndarray, wanted_T: np.ndarray) -> dict[str, np.ndarray]:
    """The wanted tokens that this rank predicts, and the places in its slice that predict them."""
    place = np.full(len(source_T), -1)
    place[own] = np.arange(len(own))
    wanted = np.flatnonzero(wanted_T)
    assert (source_T[wanted] >= 0).all(), "nothing predicts a wanted token"
    source = place[source_T[wanted]]
    return {"wanted": wanted[source >= 0], "place": source[source >= 0]}


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Copy arrays to the device in one transfer, for which the host does not wait."""
    by_size = sorted(arrays.items(), key=lambda item: -item[1].itemsize)  # so that all are aligned
    ends = np.cumsum([array.nbytes for _, array in by_size]).tolist()
    staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for (_, array), end in zip(by_size, ends, strict=True):
        staging.numpy()[end - array.nbytes : end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = staging.to(device, non_blocking=True)
    return {
        name: moved[end - array.nbytes : end].view(_TORCH_TYPES[array.dtype.str]).view(array.shape)
        for (name, array), end in zip(by_size, ends, strict=True)
    }


_TORCH_TYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "<u2": torch.uint16,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}


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
