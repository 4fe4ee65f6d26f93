"""A training checkpoint's weights, read and written by one process without the ranks, a tensor at a time."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[reportPrivateImportUsage]  # documented there
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_bridge.architecture import Architecture
from megatron_bridge.checkpoint import COMMON_STATE, common_state, sharded_parameters
from megatron_bridge.device import on_device
from megatron_bridge.model import named_parameters, outline
from treepo.errors import ModelError

FILE_BYTES = 1 << 30  # of a written file, all of whose tensors are in memory at once


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint that holds some first-axis rows of a parameter, or all of them."""

    key: str
    shape: torch.Size


def stored_parameters(architecture: Architecture) -> dict[str, list[Stored]]:
    """For every parameter of the whole model, by the name that the families' tables give it, the tensors that
    one above the other are the parameter.
    """
    with on_device(), _alone():
        model = outline(architecture, torch.bfloat16)
        sharded = {id(each.data): each for each in nested_values(sharded_parameters(model))}
        return {
            name: [
                Stored(each.key, torch.Size(each.local_shape)) for each in _tensors(sharded[id(parameter)])
            ]
            for name, parameter in named_parameters([model]).items()
        }


def _tensors(sharded: Any) -> list[ShardedTensor]:
    return [sharded] if isinstance(sharded, ShardedTensor) else list(nested_values(sharded.build()))


@contextmanager
def _alone() -> Iterator[None]:
    """Megatron-Core's groups of one rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class TensorReader:
    """The tensors of a distributed checkpoint, whichever ranks wrote them. Raises ModelError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except OSError as error:
            raise ModelError(f"{folder}: not readable: {error.strerror}") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, key: str) -> Tensor:
        """The whole tensor, in the dtype in which it is stored."""
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ModelError(f"{self._folder}: no tensor {key}")
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({key: tensor}, self._metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except OSError as error:
            raise ModelError(f"{self._folder}: not readable: {error.strerror}: {error.filename}") from None
        return tensor


def write_tensors(
    folder: Path, tensors: Mapping[str, tuple[torch.Size, torch.dtype]], make: Callable[[str], Tensor]
) -> None:
    """A distributed checkpoint of these tensors; each is made when it is written."""
    writer = FileSystemWriter(folder)
    planner = _Planner(make)
    planner.set_up_planner({}, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    items = [WriteItem(MetadataIndex(COMMON_STATE), WriteItemType.BYTE_IO)]
    items += [_item(key, shape, dtype) for key, (shape, dtype) in tensors.items()]
    plans, metadata = planner.create_global_plan([SavePlan(list(group)) for group in _files(items)])
    plans = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])


def _item(key: str, shape: torch.Size, dtype: torch.dtype) -> WriteItem:
    start = torch.Size([0] * len(shape))
    chunk = ChunkStorageMetadata(offsets=start, sizes=shape)
    return WriteItem(
        MetadataIndex(key, start),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, TensorProperties(dtype=dtype), shape),
    )


def _files(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    """Consecutive items of at most FILE_BYTES together, or one."""
    group: list[WriteItem] = []
    used = 0
    for item in items:
        data = item.tensor_data
        size = data.size.numel() * data.properties.dtype.itemsize if data else 0
        if group and used + size > FILE_BYTES:
            yield group
            group, used = [], 0
        group.append(item)
        used += size
    yield group


class _Planner(DefaultSavePlanner):
    """It has no tensors: `make` makes each when it is due."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return common_state()
        return self._make(write_item.index.fqn)
