"""Sends weights by one broadcast to all engines: NCCL between devices, gloo between hosts' memories.

NCCL allows one process on a device, so the engines need devices of their own. gloo has no such limit.

Each rank of an engine tells the sender what its loader reads of the lane's tensors. The ranks that read the
same form a group with the sender, and get those parts of the tensors only. Groups are kept from update to
update. They are outside torch's default process group, so they do not interfere with those of trainer and
engines.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate
from typing import Any, ClassVar

import orjson
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.weight_sync.listening_store import listening_store
from treepo.weight_sync.shards import decoded, part_bounds, read_bytes
from treepo.weight_sync.wire import Bucket, Manifest, Reads, Remark, Shards, Stripes, TensorInfo

_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True, slots=True)
class InBroadcast:
    """The bytes arrive by the broadcast itself."""


@dataclass(frozen=True, slots=True)
class BroadcastAddress:
    """first: the number of the engine's rank 0 among the ranks of all engines. through_host: whether buffers
    are in host memory.
    """

    host: str
    port: int
    name: str
    first: int
    seconds: float
    through_host: bool

    def join(self, rank: int, device: torch.device, reads: Reads) -> "BroadcastReceiver":
        if self.through_host:
            device = torch.device("cpu")
        patience = timedelta(seconds=self.seconds)
        store = TCPStore(self.host, self.port, is_master=False, timeout=patience)
        meeting, number = PrefixStore(self.name, store), self.first + rank
        share = (TensorInfo(**info) for info in _taken(meeting, "share"))
        shards = reads(tuple(replace(info, shape=tuple(info.shape)) for info in share))
        _give(meeting, f"shards-{number}", shards)
        groups: list[list[int]] = _taken(meeting, "groups")
        part = next(index for index, group in enumerate(groups) if number in group)
        members = groups[part]
        group = form_group(
            meeting, f"group-{part}", 1 + members.index(number), 1 + len(members), self.seconds, device
        )
        return BroadcastReceiver(group, self.seconds, device, part, shards)


class BroadcastSender:
    """device: of the buffers. seconds: deadline of each step."""

    collective: ClassVar[bool] = True

    def __init__(self, device: torch.device, host: str, seconds: float) -> None:
        self._device, self._host, self._seconds = device, host, seconds
        self._store = listening_store(host, timedelta(seconds=seconds))
        self._meetings = 0
        self._ranks = 0
        self._readers: list[Shards] = []
        self._groups: list[Any] = []  # of each reader
        self._buffers: dict[int, Tensor] = {}
        self._works: list[Any] = []

    def addresses(self, ranks: Sequence[int]) -> list[BroadcastAddress]:
        self._meetings += 1
        self._ranks = sum(ranks)
        through_host = self._device.type == "cpu"
        return [
            BroadcastAddress(self._host, self._store.port, self._name, first, self._seconds, through_host)
            for first in list(accumulate(ranks, initial=0))[:-1]
        ]

    def connect(self, share: Manifest) -> Sequence[Shards]:
        meeting = PrefixStore(self._name, self._store)
        _give(meeting, "share", share)
        members: dict[bytes, list[int]] = {}
        for rank in range(self._ranks):
            members.setdefault(meeting.get(f"shards-{rank}"), []).append(rank)
        self._readers = [decoded(orjson.loads(shards)) for shards in members]
        _give(meeting, "groups", list(members.values()))
        for part, ranks in enumerate(members.values()):
            group = form_group(meeting, f"group-{part}", 0, 1 + len(ranks), self._seconds, self._device)
            self._groups.append(group)
        return self._readers

    def buffer(self, index: int, nbytes: int) -> Tensor:
        held = self._buffers.get(index % 2)
        if held is None or len(held) < nbytes:
            held = self._buffers[index % 2] = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return held[:nbytes]

    def filled(self, index: int, flat: Tensor) -> None: ...

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> InBroadcast:
        del index
        for group, (start, end) in zip(self._groups, part_bounds(tensors, self._readers), strict=True):
            if start < end:
                self._works.append(group.broadcast([flat[start:end]], dist.BroadcastOptions()))
        return InBroadcast()

    def finish(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait(timedelta(seconds=self._seconds))

    def end(self, version: int) -> None:
        del version
        self._buffers.clear()

    def close(self) -> None:
        self._works = []
        self._buffers.clear()
        while self._groups:
            leave_group(self._groups.pop())

    def take_remarks(self) -> list[Remark]:
        return []

    @property
    def _name(self) -> str:
        return f"weights-{self._meetings}"


class BroadcastReceiver:
    def __init__(self, group: Any, seconds: float, device: torch.device, part: int, shards: Shards) -> None:
        self._group: Any = group
        self._seconds, self._device = seconds, device
        self.part, self.shards = part, shards
        self._flat: Tensor | None = None
        self._work: Any = None

    def begin(self, bucket: Bucket) -> None:
        nbytes = read_bytes(bucket.tensors, self.shards)
        self._flat = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        if nbytes:
            self._work = self._group.broadcast([self._flat], dist.BroadcastOptions())

    def receive(self, bucket: Bucket) -> Tensor:
        del bucket
        flat, work = self._flat, self._work
        assert flat is not None
        self._flat = self._work = None
        if work is not None:
            work.wait(timedelta(seconds=self._seconds))
        return flat

    def stripes(self, bucket: Bucket) -> Stripes:
        del bucket
        return slice(None)

    def end(self) -> None: ...

    def close(self) -> None:
        leave_group(self._group)
        self._group = None


def _give(store: Store, key: str, value: object) -> None:
    """Tell other processes. Equal shards of the same tensors are told by the same bytes."""
    store.set(key, orjson.dumps(value).decode())


def _taken(store: Store, key: str) -> Any:
    """What another process tells, or will tell before the deadline."""
    return orjson.loads(store.get(key))


def form_group(store: Store, name: str, rank: int, size: int, seconds: float, device: torch.device) -> Any:
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


def leave_group(group: Any) -> None:
    """Leave a group in any state: a collective that still waits ends with an error."""
    if group is not None and hasattr(group, "abort"):
        group.abort()
