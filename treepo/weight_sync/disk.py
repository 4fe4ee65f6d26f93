"""Sends weights through a folder that trainer and engines share, also between machines.

`version-N/` holds one safetensors file for each bucket and their index, like a Hugging Face folder. Engines
load each file as soon as it is written; the folder gets its name when all files are complete.

With `weights.delta` most versions hold only what changed since the last whole one, their base
(`treepo.weight_sync.delta`). Every delta is against the base, not against the version before: so an engine
needs two files for a bucket, keeps nothing between updates, and loads the same whatever it served before. The
base is read where its files are: in the page cache of each node, once for all ranks, if there is memory. The
first version is whole, at least each `full_every`-th after it, the next one after an engine has failed or
joined, and the next one after a delta that is larger than the average version since the base.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import orjson
import torch
from torch import Tensor

from treepo.weight_sync.delta import apply, encode
from treepo.weight_sync.wire import Bucket, Manifest, Reads, Remark, Shards, Stripes

_INDEX = "model.safetensors.index.json"
_DELTA_INDEX = "delta.index.json"
_BASE = "base"
_OURS = re.compile(r"(?P<kind>version|base)-(?P<number>\d+)")  # folders that we may remove
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64",
           "int32": "I32", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}  # fmt: skip
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class FileLocation:
    """data: offset of the bucket's bytes in the file."""

    path: str
    data: int


@dataclass(frozen=True, slots=True)
class DeltaLocation:
    """nbytes: of the delta's file. base: the same bucket, whole."""

    path: str
    nbytes: int
    base: FileLocation


@dataclass(frozen=True, slots=True)
class DiskAddress:
    def join(self, rank: int, device: torch.device, reads: Reads) -> "DiskReceiver":
        del rank, reads
        return DiskReceiver(device)


@dataclass(slots=True)
class _Base:
    """A whole version on disk. buckets: of each the file, the offset of the data in it, and its bytes. age:
    versions since. written: bytes of it and of those. last: of the newest.
    """

    folder: Path
    buckets: Sequence[tuple[str, int, int]]
    written: int
    last: int = 0
    age: int = 0

    @property
    def outlived(self) -> bool:
        """Whether a new base takes fewer bytes: the newest delta is larger than the average version was."""
        return self.last * (self.age + 1) > self.written


class DiskSender:
    """keep: number of complete versions to keep, the newest; the bases that they need are kept too.
    full_every: most versions from one whole version to the next; None: all are whole.
    """

    collective: ClassVar[bool] = False

    def __init__(self, folder: Path, keep: int, full_every: int | None = None) -> None:
        self._folder, self._keep, self._full_every = folder, keep, full_every
        self._partial = folder / _PARTIAL
        self._buffers: dict[int, Tensor] = {}
        self._files: dict[str, Manifest] = {}
        self._whole: list[tuple[str, int, int]] = []  # of this version, as in `_Base.buckets`
        self._base: _Base | None = None
        self._delta: bytes | None = None  # of the bucket that is filled
        self._written = 0
        self._remarks: list[Remark] = []
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

    def filled(self, index: int, flat: Tensor, tensors: Manifest) -> None:
        """Compute the delta, while engines load the bucket before."""
        del tensors
        self._delta = None
        if index == 0:
            self._check_base()
        base = self._base
        if base is None or self._full_every is None or base.age + 1 >= self._full_every or base.outlived:
            return
        file, data, nbytes = base.buckets[index]
        assert nbytes == len(flat), "the model has other tensors than before"
        delta = encode(_mapped(str(base.folder / file), data, nbytes).numpy(), flat.numpy())
        if len(delta) < len(flat):
            self._delta = delta

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> FileLocation | DeltaLocation:
        if index == 0:
            shutil.rmtree(self._partial, ignore_errors=True)  # of an update that was abandoned
            self._partial.mkdir(parents=True, exist_ok=True)
        delta, self._delta = self._delta, None
        if delta is not None and self._base is not None:
            path = self._partial / f"model-{index:05d}.delta"
            path.write_bytes(delta)
            self._note(path, tensors, len(delta))
            file, data, _ = self._base.buckets[index]
            return DeltaLocation(str(path), len(delta), FileLocation(str(self._base.folder / file), data))
        path = self._partial / f"model-{index:05d}.safetensors"
        header = _header(tensors)
        with path.open("wb") as file:
            file.write(header)
            file.write(flat.numpy().data)
        self._note(path, tensors, len(header) + len(flat))
        self._whole.append((path.name, len(header), len(flat)))
        return FileLocation(str(path), len(header))

    def finish(self) -> None: ...

    def end(self, version: int) -> None:
        weight_map = {tensor.name: file for file, tensors in self._files.items() for tensor in tensors}
        size = sum(tensor.nbytes for tensors in self._files.values() for tensor in tensors)
        is_whole = len(self._whole) == len(self._files)
        target = self._folder / f"version-{version}"
        if self._base is not None and self._base.folder == target and not is_whole:
            # No engine survived the attempt before, which was complete. Its folder is the base of this one.
            self._base.folder = target.rename(self._folder / f"base-{version}")
        metadata: dict[str, object] = {"total_size": size}
        if not is_whole and self._base is not None:
            metadata[_BASE] = self._base.folder.name
        index = {"metadata": metadata, "weight_map": weight_map}
        (self._partial / (_INDEX if is_whole else _DELTA_INDEX)).write_bytes(orjson.dumps(index))
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that no engine survived
        self._partial.rename(target)
        self._remember(target, version, size, is_whole)
        self._clear()
        self._remove_old(version)

    def close(self) -> None:
        """The next version is whole: an engine that comes or comes back may not have read the base before."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self._base = None
        self._clear()

    def take_remarks(self) -> list[Remark]:
        remarks, self._remarks = self._remarks, []
        return remarks

    def _check_base(self) -> None:
        """Forget a base that somebody has removed."""
        if self._base is not None and not self._base.folder.is_dir():
            text = f"weights: {self._base.folder} is gone; the next version is written whole"
            self._remarks.append(Remark(logging.WARNING, text))
            self._base = None

    def _note(self, path: Path, tensors: Manifest, nbytes: int) -> None:
        self._files[path.name] = tensors
        self._written += nbytes

    def _remember(self, target: Path, version: int, size: int, is_whole: bool) -> None:
        if self._full_every is None:
            return
        if is_whole:
            self._base = _Base(target, tuple(self._whole), self._written)
        elif self._base is not None:
            self._base.age += 1
            self._base.written += self._written
            self._base.last = self._written
            text = (
                f"weights of version {version}: {self._written:,} bytes written for {size:,}, what changed "
                f"since {self._base.folder.name}"
            )
            self._remarks.append(Remark(logging.INFO, text))

    def _clear(self) -> None:
        self._files.clear()
        self._whole.clear()
        self._buffers.clear()
        self._delta, self._written = None, 0

    def _remove_old(self, version: int) -> None:
        """Remove all but the newest versions and their bases."""
        ours = {path: match for path in self._folder.iterdir() if (match := _OURS.fullmatch(path.name))}
        numbers = sorted(int(match["number"]) for match in ours.values() if match["kind"] == "version")
        kept = [number for number in numbers if number <= version][-self._keep :]  # a newer one is of a run
        names = {f"version-{number}" for number in kept}  # that went back to a checkpoint
        names |= {base for name in names if (base := _base_of(self._folder / name)) is not None}
        if self._base is not None:
            names.add(self._base.folder.name)
        for path in ours:
            if path.name not in names:
                shutil.rmtree(path)


class DiskReceiver:
    part: int = 0
    shards: Shards | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self, bucket: Bucket) -> None: ...

    def receive(self, bucket: Bucket) -> Tensor:
        location = bucket.location
        if isinstance(location, FileLocation):
            return _mapped(location.path, location.data, bucket.nbytes).to(self._device)
        assert isinstance(location, DeltaLocation)
        base = location.base
        whole = torch.empty(bucket.nbytes + bucket.nbytes % 2, dtype=torch.uint8, device=self._device)
        whole[bucket.nbytes :] = 0  # the other half of the last word
        whole[: bucket.nbytes].copy_(_mapped(base.path, base.data, bucket.nbytes))
        delta = Path(location.path).read_bytes()
        if len(delta) != location.nbytes:
            raise OSError(f"{location.path} has {len(delta)} bytes here; {location.nbytes} were written")
        try:
            apply(delta, whole)
        except ValueError as error:
            raise OSError(f"{location.path}: {error}") from error
        return whole[: bucket.nbytes]

    def stripes(self, bucket: Bucket) -> Stripes:
        del bucket
        return slice(None)

    def end(self) -> None: ...

    def close(self) -> None: ...


def _mapped(path: str, data: int, nbytes: int) -> Tensor:
    """The `nbytes` bytes of a file from `data` to its end: uint8, read as they are used."""
    written = Path(path).stat().st_size
    if written != data + nbytes:
        raise OSError(f"{path} has {written} bytes here; {data + nbytes} were written")
    return torch.from_file(path, shared=False, size=data + nbytes, dtype=torch.uint8)[data:]


def _base_of(folder: Path) -> str | None:
    """The name of the folder that a version's deltas are against; None if it is whole."""
    index = folder / _DELTA_INDEX
    return orjson.loads(index.read_bytes())["metadata"][_BASE] if index.exists() else None


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
