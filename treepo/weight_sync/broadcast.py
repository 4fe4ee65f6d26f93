"""Sends weights by one broadcast to all engines: NCCL between devices, gloo between hosts' memories.

NCCL allows one process on a device, so the engines need devices of their own. gloo has no such limit.

Each rank of an engine tells the sender what its loader reads of the lane's tensors. The ranks that read the
same form a group with the sender, and get those parts of the tensors only. Groups are kept from update to
update. They are outside torch's default process group, so they do not interfere with those of trainer and
engines.
"""

import logging
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

from treepo.weight_sync.host_delta import ReceivedParts, SentParts
from treepo.weight_sync.listening_store import listening_store
from treepo.weight_sync.shards import decoded, part_bounds, read_bytes
from treepo.weight_sync.wire import Bucket, Manifest, Reads, Remark, Shards, Stripes, TensorInfo

_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True, slots=True)
class InBroadcast:
    """The bytes arrive by the broadcast itself. index: of the bucket. deltas: bytes of each part's delta; 0
    for a part that is sent whole.
    """

    index: int
    deltas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BroadcastAddress:
    """first: the number of the engine's rank 0 among the ranks of all engines. through_host: whether buffers
    are in host memory. delta: whether parts may be sent as deltas.
    """

    host: str
    port: int
    name: str
    first: int
    seconds: float
    through_host: bool
    delta: bool

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
        held = ReceivedParts() if self.delta else None
        return BroadcastReceiver(group, self.seconds, device, part, shards, held)


class BroadcastSender:
    """device: of the buffers. seconds: deadline of each step. delta: whether to send what has changed; only
    through host memory.
    """

    collective: ClassVar[bool] = True

    def __init__(self, device: torch.device, host: str, seconds: float, *, delta: bool = False) -> None:
        assert device.type == "cpu" or not delta
        self._device, self._host, self._seconds = device, host, seconds
        self._store = listening_store(host, timedelta(seconds=seconds))
        self._meetings = 0
        self._ranks = 0
        self._readers: list[Shards] = []
        self._groups: list[Any] = []  # of each reader
        self._buffers: dict[int, Tensor] = {}
        self._messages: list[tuple[Any, Tensor]] = []  # of the bucket that is filled: group and bytes
        self._deltas: tuple[int, ...] = ()
        self._works: list[Any] = []
        self._sent = SentParts() if delta else None
        self._bytes = [0, 0]  # of this update: sent, and of the parts
        self._told = False  # how much deltas save
        self._remarks: list[Remark] = []

    def addresses(self, ranks: Sequence[int]) -> list[BroadcastAddress]:
        self._meetings += 1
        self._ranks = sum(ranks)
        through_host = self._device.type == "cpu"
        return [
            BroadcastAddress(
                self._host,
                self._store.port,
                self._name,
                first,
                self._seconds,
                through_host,
                self._sent is not None,
            )
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

    def filled(self, index: int, flat: Tensor, tensors: Manifest) -> None:
        """Compute the deltas, while the bucket before travels."""
        self._messages, deltas = [], []
        for part, (start, end) in enumerate(part_bounds(tensors, self._readers)):
            message, delta = flat[start:end], 0
            if start < end and self._sent is not None:
                message, delta = self._sent.message((index, part), message)
            self._messages.append((self._groups[part], message))
            deltas.append(delta)
            self._bytes = [self._bytes[0] + len(message), self._bytes[1] + end - start]
        self._deltas = tuple(deltas)

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> InBroadcast:
        del flat, tensors
        for group, message in self._messages:
            if len(message):
                self._works.append(group.broadcast([message], dist.BroadcastOptions()))
        return InBroadcast(index, self._deltas)

    def finish(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait(timedelta(seconds=self._seconds))

    def end(self, version: int) -> None:
        del version
        sent, whole = self._bytes
        if sent < whole and not self._told:
            self._told = True
            text = f"weights.delta: a source has sent {sent:,} bytes, what changed, in place of {whole:,}"
            self._remarks.append(Remark(logging.INFO, text))
        self._release()

    def close(self) -> None:
        self._works = []
        self._release()
        self._told = False
        if self._sent is not None:
            self._sent.forget()
        while self._groups:
            leave_group(self._groups.pop())

    def take_remarks(self) -> list[Remark]:
        remarks, self._remarks = self._remarks, []
        return remarks

    def _release(self) -> None:
        self._buffers.clear()
        self._messages.clear()
        self._bytes = [0, 0]

    @property
    def _name(self) -> str:
        return f"weights-{self._meetings}"


class BroadcastReceiver:
    """held: the parts as they were last sent, to which deltas are applied; None if all parts are whole."""

    def __init__(
        self,
        group: Any,
        seconds: float,
        device: torch.device,
        part: int,
        shards: Shards,
        held: ReceivedParts | None,
    ) -> None:
        self._group: Any = group
        self._seconds, self._device = seconds, device
        self.part, self.shards = part, shards
        self._held = held
        self._flat: Tensor | None = None
        self._work: Any = None

    def begin(self, bucket: Bucket) -> None:
        index, delta = self._place(bucket)
        nbytes = read_bytes(bucket.tensors, self.shards)
        if self._held is not None and not delta:
            self._flat = self._held.room(index, nbytes)
        else:
            self._flat = torch.empty(delta or nbytes, dtype=torch.uint8, device=self._device)
        if nbytes:
            self._work = self._group.broadcast([self._flat], dist.BroadcastOptions())

    def receive(self, bucket: Bucket) -> Tensor:
        index, delta = self._place(bucket)
        flat, work = self._flat, self._work
        assert flat is not None
        self._flat = self._work = None
        if work is not None:
            work.wait(timedelta(seconds=self._seconds))
        if not delta:
            return flat
        assert self._held is not None
        return self._held.changed(index, flat, read_bytes(bucket.tensors, self.shards))

    def _place(self, bucket: Bucket) -> tuple[int, int]:
        """The bucket's number, and the length of the delta that this rank gets in place of its part; 0 if it
        gets the part.
        """
        location = bucket.location
        assert isinstance(location, InBroadcast)
        return location.index, location.deltas[self.part]

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
