"""Reads and writes Megatron-Core's distributed checkpoint in one process, one tensor at a time.

`checkpoint.py` saves and loads the same format from running ranks. Here no rank runs: `treepo convert` uses
it.
"""

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[reportPrivateImportUsage]  # documented there
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_bridge.architecture import Architecture
from megatron_bridge.atomic_folder import reason_and_file, split_into_files
from megatron_bridge.checked_writer import CheckedWriter
from megatron_bridge.checkpoint_pickles import read_index
from megatron_bridge.model import build_outline, named_parameters
from megatron_bridge.process_groups import form_groups, leave_groups
from megatron_bridge.runtime import on_device
from treepo.config.trainer import ParallelConfig, TrainerConfig
from treepo.errors import ModelError, shortened

FILE_BYTES = 1 << 30  # most bytes of a written file, whose tensors are all in memory at once
EXTRA_STATE = "_extra_state"  # key of Transformer Engine's layers, needed for 8-bit training alone
COMMON_STATE = ShardedObject("common_state", {}, (1,), (0,))
"""Megatron-Core needs it to load. It is empty, because our manifest has its content."""

READ_FAILURES = (
    OSError,
    RuntimeError,  # torch: a file that is not its archive
    pickle.UnpicklingError,
    AssertionError,  # torch: parts that do not fit together
    *(EOFError, ImportError, LookupError, AttributeError, TypeError, ValueError, MemoryError, OverflowError),
)
"""The exceptions of a damaged file: its parts are pickles, and those fail in any of these ways."""

# One tensor a parameter, not one of all layers or all experts.
_METADATA = {"singleton_local_shards": True}


def sharded_parameters(module: Any) -> dict[str, Any]:
    """A model chunk's parameters as sharded tensors, which share its memory."""
    state = module.sharded_state_dict(metadata=_METADATA)
    return {name: sharded for name, sharded in state.items() if not name.endswith(EXTRA_STATE)}


def sharded_tensors(sharded: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The checkpoint tensors that make up a parameter when stacked along the first axis: one, or two for the
    gate and up projections.
    """
    return [sharded] if isinstance(sharded, ShardedTensor) else list(nested_values(sharded.build()))


def unreadable(folder: Path, reason: BaseException | str) -> ModelError:
    """The error of a checkpoint whose files have their sizes, but not their content."""
    text = reason if isinstance(reason, str) else reason_and_file(reason)
    if not isinstance(reason, (str, OSError)):  # by itself the text may be "0" or empty
        text = f"{type(reason).__name__}: {text}"
    return ModelError(f"{folder}: not readable as this model's: {shortened(text, 300)}")


def declare_format(folder: Path) -> None:
    """Write the file by which Megatron-Core recognises a distributed checkpoint."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of a checkpoint that holds all or some first-axis rows of a parameter."""

    key: str
    shape: torch.Size


def checkpoint_tensors(architecture: Architecture) -> dict[str, list[CheckpointTensor]]:
    """For every parameter of the whole model, by its name in the families' tables, the tensors that make it
    up when stacked along the first axis.
    """
    with on_device(), _single_rank():
        (model,) = build_outline(architecture, torch.bfloat16, TrainerConfig())
        sharded = {id(each.data): each for each in nested_values(sharded_parameters(model))}
        return {
            name: [
                CheckpointTensor(tensor.key, torch.Size(tensor.local_shape))
                for tensor in sharded_tensors(sharded[id(parameter)])
            ]
            for name, parameter in named_parameters([model]).items()
        }


@contextmanager
def _single_rank() -> Iterator[None]:
    """Megatron-Core's groups with this process as the only rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        form_groups(ParallelConfig())
        yield
    finally:
        leave_groups()


class DistributedCheckpointReader:
    """Reads whole tensors of a distributed checkpoint of any layout.

    Raises ModelError if the folder or a file in it cannot be read, or lacks a tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = read_index(folder)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        except READ_FAILURES as error:
            raise unreadable(folder, error) from None

    def keys(self) -> Set[str]:
        """The keys of all tensors and other values."""
        return self._metadata.state_dict_metadata.keys()

    def read_any(self, key: str) -> Tensor | bytes:
        """A whole tensor, or the bytes of any other value, such as a generator's state."""
        if isinstance(self._metadata.state_dict_metadata.get(key), TensorStorageMetadata):
            return self.read(key)
        place = self._metadata.storage_data[MetadataIndex(key)]
        try:
            with (self._folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                return file.read(place.length)
        except OSError as error:
            raise unreadable(self._folder, error) from None

    def read(self, key: str) -> Tensor:
        """The whole tensor, in the checkpoint's dtype."""
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ModelError(f"{self._folder}: no tensor {key}")
        try:
            tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner({key: tensor}, self._metadata, is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except READ_FAILURES as error:
            raise unreadable(self._folder, error) from None
        return tensor


def write_distributed_checkpoint(
    folder: Path, tensors: Mapping[str, tuple[torch.Size, torch.dtype]], make: Callable[[str], Tensor]
) -> None:
    """Write a distributed checkpoint of tensors with these keys, shapes and dtypes.

    `make` makes the tensor of a key when its file is written. The folder must exist.
    """
    declare_format(folder)
    writer = CheckedWriter(folder)
    planner = _LazyPlanner(make)
    planner.set_up_planner({}, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    items = [WriteItem(MetadataIndex(COMMON_STATE.unique_key), WriteItemType.BYTE_IO)]
    items += [_write_item(key, shape, dtype) for key, (shape, dtype) in tensors.items()]
    files = split_into_files(items, _item_bytes, FILE_BYTES)
    plans, metadata = planner.create_global_plan([SavePlan(file) for file in files])
    plans = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])


def _write_item(key: str, shape: torch.Size, dtype: torch.dtype) -> WriteItem:
    start = torch.Size([0] * len(shape))
    chunk = ChunkStorageMetadata(offsets=start, sizes=shape)
    return WriteItem(
        MetadataIndex(key, start),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, TensorProperties(dtype=dtype), shape),
    )


def _item_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return data.size.numel() * data.properties.dtype.itemsize if data else 0


class _LazyPlanner(DefaultSavePlanner):
    """Makes each tensor when it is written, by `make`."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([COMMON_STATE.data], data)
            return data
        return self._make(write_item.index.fqn)
