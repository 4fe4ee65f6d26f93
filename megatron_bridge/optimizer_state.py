"""Adam's moments and the float32 master weights, as pieces of tensors that have their parameter's shape.

Megatron-Core's distributed optimizer gives each data-parallel rank a run of a parameter's flattened values.
As at most three rectangles of the parameter, any other run of any other layout can be read from it, and no
rank ever holds more than its own. (Megatron-Core's `fully_reshardable` gathers the whole on every rank when
loading; its gathered buffer is cut short of the gaps between parameters of sizes that are no multiple of 64.)
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def start_moments(optimizer: MegatronOptimizer) -> None:
    """Make the moments, which the first step would make otherwise: memory that others must not count as free,
    and something to load into.
    """
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    set_steps(optimizer, 0)


def sharded_moments(optimizer: MegatronOptimizer, model: dict[Any, Any]) -> list[ShardedTensor]:
    """The pieces of this rank, which share the optimizer's memory. model: its parameters' sharded tensors."""
    of_parameter = {id(sharded.data): sharded for sharded in nested_values(model)}
    pieces: list[ShardedTensor] = []
    for part in _parts(optimizer):
        for parameter, owned in _owned(part):
            replicas = of_parameter[id(parameter)]
            for name, values in _values(part, parameter):
                pieces += _pieces(replicas, name, values, owned.start)
    return pieces


def set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """Torch's Adam counts each parameter's steps, Transformer Engine's those of a group."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            for moments in part.optimizer.state.values():
                moments["step"] = torch.tensor(float(steps))
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


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron-Core's optimizers of different kinds of parameters, all of them distributed ones."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _owned(part: Any) -> Iterator[tuple[Tensor, Any]]:
    """The parameters of which this rank owns values, and the range of them."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def _values(part: Any, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps of the values that this rank owns, flat. A float32 parameter is its own
    master.
    """
    group, index = part.model_param_group_index_map[parameter]
    master = part.optimizer.param_groups[group]["params"][index]
    if parameter.dtype != torch.float32:
        yield "master", master
    for name in MOMENTS:
        yield name, part.optimizer.state[master][name]


def _pieces(
    sharded: ShardedTensor | ShardedTensorFactory, name: str, values: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """values: flat, those of the parameter from `start` on."""
    values = values.detach()
    end = start + len(values)
    first = 0  # of the tensor's values within the parameter
    for tensor in _tensors(sharded):
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


def _tensors(sharded: ShardedTensor | ShardedTensorFactory) -> Iterable[ShardedTensor]:
    """One above the other they are the parameter; gate and up projection are stored apart."""
    return [sharded] if isinstance(sharded, ShardedTensor) else nested_values(sharded.build())
