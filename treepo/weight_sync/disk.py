"""Sends weights through a folder that trainer and engines share, also between machines.

`version-N/` holds one safetensors file for each bucket and their index, like a Hugging Face folder. Engines
load each file as soon as it is written; the folder gets its name when all files are complete.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import orjson
import torch
from torch import Tensor

from treepo.weight_sync.wire import Bucket, Manifest, Reads, Remark, Shards, Stripes

_INDEX = "model.safetensors.index.json"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64",
           "int32": "I32", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}  # fmt: skip
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class FileLocation:
    """data: offset of the bucket's bytes in the file."""

    path: str
    data: int


@dataclass(frozen=True, slots=True)
class DiskAddress:
    def join(self, rank: int, device: torch.device, reads: Reads) -> "DiskReceiver":
        del rank, reads
        return DiskReceiver(device)


class DiskSender:
    """keep: number of complete versions to keep, the newest."""

    collective: ClassVar[bool] = False

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._partial = folder / _PARTIAL
        self._buffers: dict[int, Tensor] = {}
        self._files: dict[str, Manifest] = {}
        self.close()  # removes the files of a process that was killed

    def addresses(self, ranks: Sequence[int]) -> list[DiskAddress]:
        return [DiskAddress()] * len(ranks)

    def connect(self, share: Manifest) -> list[None]:
        del share
        return [None]

    def buffer(self, index: int, nbytes: int) -> Tensor:
        held = self._buffers.get(index % 2)
        if held is None or len(held) < nbytes:
            held = self._buffers[index % 2] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes]

    def filled(self, index: int, flat: Tensor) -> None: ...

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> FileLocation:
        if index == 0:
            self._partial.mkdir(parents=True)
        path = self._partial / f"model-{index:05d}.safetensors"
        header = _header(tensors)
        with path.open("wb") as file:
            file.write(header)
            file.write(flat.numpy().data)
        self._files[path.name] = tensors
        return FileLocation(str(path), len(header))

    def finish(self) -> None: ...

    def end(self, version: int) -> None:
        weight_map = {tensor.name: file for file, tensors in self._files.items() for tensor in tensors}
        size = sum(tensor.nbytes for tensors in self._files.values() for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self._partial / _INDEX).write_bytes(orjson.dumps(index))
        target = self._folder / f"version-{version}"
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that no engine survived
        self._partial.rename(target)
        self._files.clear()
        self._buffers.clear()
        numbers = sorted(int(path.name.split("-")[1]) for path in self._folder.glob("version-*"))
        older = [number for number in numbers if number <= version]
        newer = numbers[len(older) :]  # of a run that went back to a checkpoint
        for number in [*older[: -self._keep], *newer]:
            shutil.rmtree(self._folder / f"version-{number}")

    def close(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._files.clear()
        self._buffers.clear()

    def take_remarks(self) -> list[Remark]:
        return []


class DiskReceiver:
    part: int = 0
    shards: Shards | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self, bucket: Bucket) -> None: ...

    def receive(self, bucket: Bucket) -> Tensor:
        location = bucket.location
        assert isinstance(location, FileLocation)
        size = location.data + bucket.nbytes
        written = Path(location.path).stat().st_size
        if written != size:
            raise OSError(f"{location.path} has {written} bytes here; {size} were written")
        mapped = torch.from_file(location.path, shared=False, size=size, dtype=torch.uint8)
        return mapped[location.data :].to(self._device)

    def stripes(self, bucket: Bucket) -> Stripes:
        del bucket
        return slice(None)

    def end(self) -> None: ...

    def close(self) -> None: ...


def _header(tensors: Manifest) -> bytes:
    """The part of a safetensors file before its data: length and JSON, padded to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = orjson.dumps(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
