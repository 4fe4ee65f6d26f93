"""The parts of a weight sync: a manifest of all tensors, then their bytes, bucket by bucket.

A bucket is one flat run of bytes: tensors one after another without padding, under their Hugging Face names.
Sender and receiver compute the same checksums over its stripes of 16 MiB. Sizes are in bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

_STRIPE = 16 << 20
_FACTOR = 31
_ROW = 512  # words that are summed before they are weighted: enough to run at memory bandwidth


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a model. dtype: torch's name, for example "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "TensorInfo":
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


Manifest = tuple[TensorInfo, ...]
"""All tensors of a model, each once, in the order in which they are sent."""


Box = tuple[tuple[int, int], ...]
"""A range of a tensor's indices in each dimension: the first, and one past the last."""

Shards = Mapping[str, tuple[Box, ...]]
"""What a rank reads, by the name of the tensor: boxes that do not overlap, none if it skips the tensor."""

Reads = Callable[[Manifest], Shards]
"""Finds what a rank reads of some tensors."""

Stripes = slice
"""Which stripes of a bucket to check."""


@dataclass(frozen=True, slots=True)
class Remark:
    """A line for the run's log. level: of `logging`."""

    level: int
    text: str


class Location(Protocol):
    """Where the receiver finds a bucket's bytes; each transport has its own."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket as an engine learns of it. checksums: of each part, one for each stripe. location: for the
    receiver.

    It has one part that all ranks read, or one for each group of ranks that read the same shards.
    """

    tensors: Manifest
    checksums: tuple[tuple[int, ...], ...]
    location: Location

    @property
    def nbytes(self) -> int:
        """Of the whole tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Receiver(Protocol):
    """One engine rank's end of a lane. part: which part of a bucket it receives. shards: what is in that
    part; None for whole tensors.
    """

    @property
    def part(self) -> int: ...
    @property
    def shards(self) -> Shards | None: ...

    def begin(self, bucket: Bucket) -> None:
        """Begin to receive, without waiting: several lanes send at the same time. Raises RuntimeError."""
        ...

    def receive(self, bucket: Bucket) -> Tensor:
        """Wait for the bucket that was begun: uint8 [bytes], on the receiver's device or in host memory,
        valid until the next bucket begins.

        Raises OSError, RuntimeError.
        """
        ...

    def stripes(self, bucket: Bucket) -> Stripes:
        """The stripes that this rank must check; if ranks read the same memory, the others check the rest."""
        ...

    def end(self) -> None:
        """Release the memory that only an update needs: the update is complete."""
        ...

    def close(self) -> None: ...


class Address(Protocol):
    """How an engine reaches the sender of one lane. It is sent to each of the engine's ranks, which join."""

    def join(self, rank: int, device: torch.device, reads: Reads) -> Receiver:
        """Connect rank `rank` of the engine to the sender. reads: finds what its loader reads."""
        ...


class Sender(Protocol):
    """The trainer's end of a lane, on the rank that joins the lane's tensors.

    collective: whether all engines take part in one operation, so that one failure breaks it for all.
    """

    collective: ClassVar[bool]

    def addresses(self, ranks: Sequence[int]) -> Sequence[Address]:
        """One address for each engine. ranks: number of ranks of each engine."""
        ...

    def connect(self, share: Manifest) -> Sequence[Shards | None]:
        """Wait for the receivers, which join meanwhile. share: the lane's tensors.

        Returns what each group of ranks reads: the parts of a bucket. Raises RuntimeError at the deadline.
        """
        ...

    def buffer(self, index: int, nbytes: int) -> Tensor:
        """The memory for bucket `index`: uint8 [nbytes]. It is reused two buckets later."""
        ...

    def filled(self, index: int, flat: Tensor, tensors: Manifest) -> None:
        """Prepare to send bucket `index`, whose bytes are in its buffer, while an earlier one travels."""
        ...

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> Location:
        """Begin to send bucket `index`, which is filled. Receivers learn the location later."""
        ...

    def finish(self) -> None:
        """Wait until the last bucket has been sent. Raises RuntimeError if it fails, or at the deadline."""
        ...

    def end(self, version: int) -> None:
        """Release the memory that only an update needs: the update is complete."""
        ...

    def close(self) -> None:
        """Release everything. May be called after a failure, and again."""
        ...

    def take_remarks(self) -> list[Remark]:
        """Lines for the run's log, each returned once."""
        ...


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


def plan_buckets[T: _Sized](parts: Sequence[T], size: int) -> list[tuple[T, ...]]:
    """Divide tensors, in order, into buckets of at most `size` bytes, or of one larger tensor."""
    buckets: list[list[T]] = []
    used = size
    for part in parts:
        if used + part.nbytes > size:
            buckets.append([])
            used = 0
        buckets[-1].append(part)
        used += part.nbytes
    return [tuple(bucket) for bucket in buckets]


def checksums(flat: Tensor, stripes: Stripes = slice(None)) -> tuple[int, ...]:
    """A checksum for each stripe of uint8 [bytes]. It changes with any byte, and with the order of rows.

    The int64 words of a row of 4 KiB are summed, and the sums weighted by odd numbers, modulo 2^64. This runs
    at memory bandwidth. It is not cryptographic, but it detects a bucket that is torn, truncated, shifted or
    confused with another. Waits for the device once.
    """
    whole = flat.numel() // _STRIPE
    words = flat[: whole * _STRIPE].view(torch.int64).view(whole, _STRIPE // 8 // _ROW, _ROW)
    sums = _weighted(words[stripes].sum(2)) * _FACTOR**2  # as for a part that has whole rows only
    chosen = range(max(-(-flat.numel() // _STRIPE), 1))[stripes]
    if whole in chosen:
        sums = torch.cat([sums, _checksum(flat[whole * _STRIPE :]).view(1)])
    return tuple(sums.tolist())


def _checksum(flat: Tensor) -> Tensor:
    """Of at most one stripe: int64 []."""
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    rows = words[: words.numel() // _ROW * _ROW].view(-1, _ROW).sum(1)
    rest = words[rows.numel() * _ROW :]
    tail = flat[words.numel() * 8 :].to(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in (rows, rest, tail):
        total = total * _FACTOR + _weighted(part)
    return total


def _weighted(values: Tensor) -> Tensor:
    """The sum over the last dimension, weighted by 1, 3, 5 and so on."""
    return (values * torch.arange(1, 2 * values.shape[-1] + 1, 2, device=values.device)).sum(-1)
