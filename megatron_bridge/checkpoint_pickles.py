"""Checks that the pickles of a distributed checkpoint hold data, before torch unpickles them.

torch reads `.metadata` and the objects among the tensors with Python's pickle, which calls any function that
a file names. So that a checkpoint of somebody else's runs no code, they are first read with a few names
allowed. torch itself reads tensors in this way.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from treepo.errors import shown

METADATA = ".metadata"
_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
}


class _DataOnly(pickle.Unpickler):
    """Raises UnpicklingError for a name that a checkpoint's metadata does not need."""

    def find_class(self, module: str, name: str) -> Any:
        data = name in _ALLOWED.get(module, ())
        if not data and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{METADATA} names {shown(f'{module}.{name}')}, which is no data")
        return super().find_class(module, name)


def check_no_code(folder: Path) -> None:
    """Raise UnpicklingError if reading the distributed checkpoint would call a function that is not for data,
    or read a file outside the folder; and what a damaged file raises.
    """
    metadata = _DataOnly(io.BytesIO((folder / METADATA).read_bytes())).load()
    for index, place in metadata.storage_data.items():
        file = place.relative_path
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise pickle.UnpicklingError(f"{METADATA} names {shown(file)}, which is no file of the folder")
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with (folder / file).open("rb") as stream:
                stream.seek(place.offset)
                torch.load(io.BytesIO(stream.read(place.length)), map_location="cpu", weights_only=True)
