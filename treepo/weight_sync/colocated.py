"""Sends weights through memory that trainer and engine share on one machine.

The buffers have no name in a file system: a receiver opens them through the sender's process. The kernel
frees them when the last process that maps them ends, even if it is killed.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from treepo.weight_sync.wire import Bucket, Manifest


class SharedBytes:
    """Memory of this process that other processes on the machine can map by its `path`."""

    def __init__(self, nbytes: int) -> None:
        self._descriptor = os.memfd_create("treepo")
        os.ftruncate(self._descriptor, nbytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.bytes = map_bytes(self.path, nbytes)

    def close(self) -> None:
        """Allow no further mapping. A process that has the memory mapped keeps it."""
        os.close(self._descriptor)


def map_bytes(path: str, nbytes: int) -> Tensor:
    """Map the shared memory at `path`: uint8 [nbytes]. Raises RuntimeError if its process has ended."""
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class SharedLocation:
    """mapped: bytes at `path`. serial: number of the buffer, because the sender reuses paths."""

    path: str
    mapped: int
    serial: int


@dataclass(frozen=True, slots=True)
class SharedAddress:
    host: str

    def join(self, rank: int, device: torch.device) -> "SharedReceiver":  # noqa: ARG002  the signature of every transport
        if socket.gethostname() != self.host:
            raise RuntimeError(
                f"weights.transport = colocated: the trainer is on {self.host}, this engine on "
                f"{socket.gethostname()}; broadcast and disk work between machines"
            )
        return SharedReceiver(device)


class SharedSender:
    """Sends through two buffers in turn."""

    collective: ClassVar[bool] = False

    def __init__(self) -> None:
        self._buffers: dict[int, SharedBytes] = {}
        self._serials: dict[int, int] = {}
        self._made = 0

    def addresses(self, ranks: Sequence[int]) -> list[SharedAddress]:
        return [SharedAddress(socket.gethostname())] * len(ranks)

    def connect(self) -> None: ...

    def buffer(self, index: int, nbytes: int) -> Tensor:
        slot = index % 2
        held = self._buffers.get(slot)
        if held is None or len(held.bytes) < nbytes:
            self._drop(slot)
            held = self._buffers[slot] = SharedBytes(nbytes)
            self._made += 1
            self._serials[slot] = self._made
        return held.bytes[:nbytes]

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> SharedLocation:
        del flat, tensors  # the receivers map the buffer itself
        held = self._buffers[index % 2]
        return SharedLocation(held.path, len(held.bytes), self._serials[index % 2])

    def finish(self) -> None: ...

    def end(self, version: int) -> None:
        del version
        self.close()

    def close(self) -> None:
        for slot in list(self._buffers):
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        if slot in self._buffers:
            self._buffers.pop(slot).close()


class SharedReceiver:
    """Maps each buffer once and copies buckets from it to the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: dict[SharedLocation, Tensor] = {}

    def receive(self, bucket: Bucket) -> Tensor:
        location = bucket.location
        assert isinstance(location, SharedLocation)
        if location not in self._mapped:
            self._mapped[location] = map_bytes(location.path, location.mapped)
        return self._mapped[location][: bucket.nbytes].to(self._device)

    def end(self) -> None:
        self._mapped.clear()

    def close(self) -> None:
        self._mapped.clear()
