"""What travels in a weight update: first a manifest of all tensors, then their bytes, bucket by bucket.

A bucket is one flat run of bytes, its tensors one after the other without padding, under their Hugging Face
names. Sender and receiver compute the same checksum over them. Sizes are bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

_ROW = 512  # words that are summed before they are weighted: long enough to run at the memory's speed


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a model. dtype: torch's name for it, "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "TensorInfo":
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @cached_property
    def nbytes(self) -> int:
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


Manifest = tuple[TensorInfo, ...]
"""All tensors of a model, each once, in the order in which they are sent."""


class Place(Protocol):
    """Where a bucket's bytes are, as its transport tells the receiver."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """checksum: of the bytes, as `checksum` computes it. place: what the transport's receiver needs."""

    tensors: Manifest
    checksum: int
    place: Place

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Receiver(Protocol):
    """One engine rank's end of a transport."""

    def receive(self, bucket: Bucket) -> Tensor:
        """uint8 [bytes] on the receiver's device, valid until the next call. Raises OSError, RuntimeError."""
        ...

    def end(self) -> None:
        """The update is complete: release what only an update needs."""
        ...

    def close(self) -> None: ...


class Address(Protocol):
    """How an engine reaches the sender. It is sent to the engine's ranks, and joined there."""

    def join(self, rank: int, device: torch.device) -> Receiver:
        """The receiver of tensor-parallel rank `rank` of the engine."""
        ...


class Sender(Protocol):
    """The trainer's end of a transport, on the rank that has the joined tensors.

    collective: whether all engines take part in one operation, so that the failure of one is everyone's.
    """

    collective: ClassVar[bool]

    def addresses(self, ranks: Sequence[int]) -> Sequence[Address]:
        """One for each engine, of so many ranks."""
        ...

    def connect(self) -> None:
        """Meet the receivers, which are joining meanwhile. Raises RuntimeError at the deadline."""
        ...

    def buffer(self, index: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] to write bucket `index` into. It is reused two buckets later."""
        ...

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> Place:
        """Begin to send bucket `index`, whose bytes are in its buffer; the receivers are told after."""
        ...

    def finish(self) -> None:
        """Wait until the last bucket has left. Raises RuntimeError where it cannot, or at the deadline."""
        ...

    def end(self, version: int) -> None:
        """The update is complete: release what only an update needs."""
        ...

    def close(self) -> None:
        """Release everything. May be called after a failure, and again."""
        ...


def plan_buckets(manifest: Manifest, size: int) -> list[Manifest]:
    """Consecutive tensors of at most `size` bytes together, or one tensor that is larger."""
    buckets: list[list[TensorInfo]] = []
    used = size
    for tensor in manifest:
        if used + tensor.nbytes > size:
            buckets.append([])
            used = 0
        buckets[-1].append(tensor)
        used += tensor.nbytes
    return [tuple(bucket) for bucket in buckets]


def views(flat: Tensor, tensors: Manifest) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a bucket's bytes, under their names. Nothing is copied where dtypes are aligned."""
    start = 0
    for tensor in tensors:
        dtype = getattr(torch, tensor.dtype)
        part = flat[start : start + tensor.nbytes]
        if part.data_ptr() % dtype.itemsize:
            part = part.clone()
        yield tensor.name, part.view(dtype).view(tensor.shape)
        start += tensor.nbytes


def checksum(flat: Tensor) -> int:
    """Of uint8 [bytes]: changes with any byte, and with the order of rows of 4 KiB. At the memory's speed.

    The int64 words of a row are summed and the sums weighted by odd numbers, modulo 2^64: no cryptography,
    but a bucket that was torn, cut, shifted or taken for another is found.
    """
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    rows = words[: words.numel() // _ROW * _ROW].view(-1, _ROW).sum(1)
    rest = words[rows.numel() * _ROW :]
    tail = flat[words.numel() * 8 :].to(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in (rows, rest, tail):
        weights = torch.arange(1, 2 * part.numel() + 1, 2, device=flat.device)
        total = total * 31 + (part * weights).sum()
    return int(total)
