"""Keeps the pickles of a distributed checkpoint from running code: whoever made it decides what is in them.

torch writes the index of the tensors (`.metadata`) and every object as a pickle, and unpickles them without a
limit. Here the index may name only the classes that describe tensors, and objects are loaded as torch loads
weights: tensors and plain containers.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from treepo.data.bounds import bounded_memory
from treepo.errors import shown

METADATA = ".metadata"
_MOST_BYTES = 1 << 30  # of the index; one of a thousand tensors on a thousand ranks has about 100 MiB
_MOST_GROWTH = 1 << 30
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class _Unpickler(pickle.Unpickler):
    """Knows the classes of the index alone. The numbers of torch's types and layouts are no code."""

    _classes: ClassVar = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int32", "int64", "uint8", "bool"},
        "pathlib": {"PosixPath", "PurePosixPath"},
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name not in self._classes.get(module_name, ()):
            raise pickle.UnpicklingError(f"{METADATA} names {module_name}.{global_name}, which none needs")
        return super().find_class(module_name, global_name)


def read_index(folder: Path, *, bounded: bool = True) -> Metadata:
    """Read the index of a distributed checkpoint.

    It names files of the folder only, and no tensor has more bytes than they have. bounded: whether the
    process's memory is bounded meanwhile, which would hit the other threads of a trainer rank too. Raises
    OSError, or for a damaged or hostile file any exception of `READ_FAILURES`.
    """
    with (folder / METADATA).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_BYTES:
            raise ValueError(f"{METADATA} has more than {_MOST_BYTES} bytes")
        # A pickle may ask for any memory in a few bytes.
        with bounded_memory(_MOST_GROWTH + 16 * size) if bounded else nullcontext():
            index = _Unpickler(file).load()
    if not isinstance(index, Metadata) or index.storage_data is None:
        raise TypeError(f"{METADATA} is no index of a checkpoint")
    for place in index.storage_data.values():
        name = place.relative_path
        if not isinstance(name, str) or "/" in name or name in ("", ".."):
            raise ValueError(f"{METADATA} names {shown(name)}, which is no file of the folder")
    whole = sum(path.stat().st_size for path in folder.iterdir())
    for key, tensor in index.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            needed = tensor.size.numel() * tensor.properties.dtype.itemsize
            if not 0 <= needed <= whole:
                raise ValueError(f"{key} has {needed} bytes, and all files {whole}")
    return index


@contextmanager
def without_code(folder: Path) -> Iterator[None]:
    """Let torch and Megatron-Core load the checkpoint in the body, without running code that is in it.

    Raises as `read_index`. The environment is the process's own: one body at a time.
    """
    read_index(folder, bounded=False)
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_WEIGHTS_ONLY]
        if before is not None:
            os.environ[_WEIGHTS_ONLY] = before
