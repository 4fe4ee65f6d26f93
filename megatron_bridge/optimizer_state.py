"""Optimizer state (Adam's averages, float32 master weights) as pieces of tensors of the parameters' shapes.

Megatron-Core's distributed optimizer gives each data-parallel rank a run of a parameter's flattened values.
Written as at most three rectangles of the parameter, a run can be read by any other layout, and no rank ever
holds more than its own run. (Megatron-Core's `fully_reshardable` gathers everything on every rank when it
loads, and its gathered buffer omits the gaps between parameters whose size is no multiple of 64.)
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_bridge.distributed_checkpoint import sharded_tensors

ADAM_STATE = ("exp_avg", "exp_avg_sq")


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Allocate what the first step would allocate. Engines that start later must not count that memory as
    free, and a checkpoint needs tensors to load into.
    """
    for part in optimizer_parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    set_step_count(optimizer, 0)


def sharded_optimizer_state(optimizer: MegatronOptimizer, model: dict[Any, Any]) -> list[ShardedTensor]:
    """The pieces of this rank, which share the optimizer's memory.

    model: the sharded tensors of this rank's parameters.
    """
    of_parameter = {id(sharded.data): sharded for sharded in nested_values(model)}
    pieces: list[ShardedTensor] = []
    for part in optimizer_parts(optimizer):
        for parameter, owned in _owned_ranges(part):
            replicas = of_parameter[id(parameter)]
            for name, values in _state_of(part, parameter):
                pieces += _pieces(replicas, name, values, owned.start)
    return pieces


def set_step_count(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set how many steps Adam has taken: torch's counts for each parameter, Transformer Engine's for each
    group.
    """
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            for parameter, state in part.optimizer.state.items():
                count = state.setdefault("step", torch.zeros((), device=parameter.device))
                count.fill_(steps)  # where it is, if the parameter is offloaded
        else:
            for group in part.optimizer.param_groups:
                group["step"] = steps


def rectangles(start: int, end: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """The values `start` to `end` of a flattened matrix as (row, column, rows, columns), in order.

    >>> list(rectangles(2, 9, columns=3))
    [(0, 2, 1, 1), (1, 0, 2, 3)]
    """
    while start < end:
        row, column = divmod(start, columns)
        if column or end - start < columns:
            height, width = 1, min(columns - column, end - start)
        else:
            height, width = (end - start) // columns, columns
        yield row, column, height, width
        start += height * width


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers that Megatron-Core chains, one for each kind of parameter."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _owned_ranges(part: Any) -> Iterator[tuple[Tensor, Any]]:
    """Each parameter of which this rank owns values, and their range in the flattened parameter."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def _state_of(part: Any, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state, flat, of the values that this rank owns. A float32 parameter is its own master
    weight.
    """
    group, index = part.model_param_group_index_map[parameter]
    master = part.optimizer.param_groups[group]["params"][index]
    if parameter.dtype != torch.float32:
        yield "master", master
    for name in ADAM_STATE:
        yield name, part.optimizer.state[master][name]


def _pieces(
    sharded: ShardedTensor | ShardedTensorFactory, name: str, values: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """Divide flat values into rectangles. values: of the flattened parameter, from `start` on."""
    values = values.detach()
    end = start + len(values)
    first = 0  # the tensor's first value, counted in the flattened parameter
    for tensor in sharded_tensors(sharded):
        rows, *others = tensor.local_shape
        columns = others[0] if others else 1
        assert len(others) <= 1, tensor
        last = first + rows * columns
        here = max(start, first), min(end, last)
        flat = here[0]
        for row, column, height, width in rectangles(here[0] - first, here[1] - first, columns):
            shape, offset = ((height, width), (row, column)) if others else ((height,), (row,))
            yield replace(
                tensor,
                key=f"optimizer.{name}.{tensor.key}",
                data=values[flat - start :][: height * width].view(shape),
                dtype=values.dtype,
                local_shape=shape,
                global_offset=tuple(a + b for a, b in zip(tensor.global_offset, offset, strict=True)),
                axis_fragmentations=None,
                replica_id=(*tensor.replica_id[:2], 0),  # type: ignore[index]  # pipeline, tensor, data
            )
            flat += height * width
        first = last
