"""Sends weights by one broadcast to all engines: NCCL between devices, gloo between hosts' memories.

NCCL allows one process on a device, so the engines need devices of their own. gloo has no such limit.

The group consists of the sending rank and every rank of every engine, and is kept from update to update. It
is outside torch's default process group, so it does not interfere with the groups of trainer and engines.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.weight_sync.listening_store import listening_store
from treepo.weight_sync.wire import Bucket, Manifest, Remark, Stripes

_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True, slots=True)
class InBroadcast:
    """The bytes arrive by the broadcast itself."""


@dataclass(frozen=True, slots=True)
class BroadcastAddress:
    """first: the group rank of the engine's rank 0. through_host: whether buffers are in host memory."""

    host: str
    port: int
    name: str
    first: int
    size: int
    seconds: float
    through_host: bool

    def join(self, rank: int, device: torch.device) -> "BroadcastReceiver":
        if self.through_host:
            device = torch.device("cpu")
        store = TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=self.seconds))
        group = _group(store, self.name, self.first + rank, self.size, self.seconds, device)
        return BroadcastReceiver(group, self.seconds, device)


class BroadcastSender:
    """device: of the buffers. seconds: deadline of each step."""

    collective: ClassVar[bool] = True

    def __init__(self, device: torch.device, host: str, seconds: float) -> None:
        self._device, self._host, self._seconds = device, host, seconds
        self._store = listening_store(host, timedelta(seconds=seconds))
        self._groups = 0
        self._size = 0
        self._group: Any = None
        self._buffers: dict[int, Tensor] = {}
        self._work: Any = None

    def addresses(self, ranks: Sequence[int]) -> list[BroadcastAddress]:
        self._groups += 1
        self._size = 1 + sum(ranks)
        firsts = list(accumulate(ranks, initial=1))[:-1]
        through_host = self._device.type == "cpu"
        return [
            BroadcastAddress(
                self._host, self._store.port, self._name, first, self._size, self._seconds, through_host
            )
            for first in firsts
        ]

    def connect(self) -> None:
        self._group = _group(self._store, self._name, 0, self._size, self._seconds, self._device)

    def buffer(self, index: int, nbytes: int) -> Tensor:
        held = self._buffers.get(index % 2)
        if held is None or len(held) < nbytes:
            held = self._buffers[index % 2] = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return held[:nbytes]

    def filled(self, index: int, flat: Tensor) -> None: ...

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> InBroadcast:
        del index, tensors
        self._work = self._group.broadcast([flat], dist.BroadcastOptions())
        return InBroadcast()

    def finish(self) -> None:
        if self._work is not None:
            work, self._work = self._work, None
            work.wait(timedelta(seconds=self._seconds))

    def end(self, version: int) -> None:
        del version
        self._buffers.clear()

    def close(self) -> None:
        self._work = None
        self._buffers.clear()
        _leave(self._group)
        self._group = None

    def take_remarks(self) -> list[Remark]:
        return []

    @property
    def _name(self) -> str:
        return f"weights-{self._groups}"


class BroadcastReceiver:
    def __init__(self, group: Any, seconds: float, device: torch.device) -> None:
        self._group: Any = group
        self._seconds, self._device = seconds, device
        self._flat: Tensor | None = None
        self._work: Any = None

    def begin(self, bucket: Bucket) -> None:
        self._flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device)
        self._work = self._group.broadcast([self._flat], dist.BroadcastOptions())

    def receive(self, bucket: Bucket) -> Tensor:
        del bucket
        flat, work = self._flat, self._work
        assert flat is not None
        self._flat = self._work = None
        work.wait(timedelta(seconds=self._seconds))
        return flat

    def stripes(self, bucket: Bucket) -> Stripes:
        del bucket
        return slice(None)

    def end(self) -> None: ...

    def close(self) -> None:
        _leave(self._group)
        self._group = None


def _group(store: Store, name: str, rank: int, size: int, seconds: float, device: torch.device) -> Any:
    """Form a process group outside of torch's default one. Blocks until all ranks have joined."""
    timeout = timedelta(seconds=seconds)
    prefixed = PrefixStore(name, store)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(prefixed, rank, size, timeout)
    _meet(prefixed, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _blocking_wait():
        group: Any = dist.ProcessGroupNCCL(prefixed, rank, size, options)
    # NCCL connects in the first collective, and waits there for all ranks. The sender begins a bucket before
    # the receivers learn of it, so they connect here.
    one = torch.zeros(1, dtype=torch.uint8, device=device)
    group.broadcast([one], dist.BroadcastOptions()).wait(timeout)
    return group


def _meet(store: Store, rank: int, size: int, timeout: timedelta) -> None:
    """Wait until every rank is here: while NCCL connects, it waits for a rank without a deadline."""
    store.set(f"here-{rank}", "1")
    store.wait([f"here-{other}" for other in range(size)], timeout)


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """Groups that are made in the body have no watchdog, and waiting for their work raises its errors.

    By default torch's watchdog ends the process a minute after a collective has failed: the sending rank and
    all engines, when one engine has died.
    """
    before = os.environ.get(_BLOCKING_WAIT)
    os.environ[_BLOCKING_WAIT] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_BLOCKING_WAIT, None)
        else:
            os.environ[_BLOCKING_WAIT] = before


def _leave(group: Any) -> None:
    """Leave a group in any state: a collective that still waits ends with an error."""
    if group is not None and hasattr(group, "abort"):
        group.abort()
