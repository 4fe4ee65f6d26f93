"""The trainer's half of a weight sync: fill buckets, send them, and find out which engine failed.

Runs on every source (`treepo.weight_sync.lanes`). While bucket k is sent and loaded, bucket k + 1 is filled
in the other of two buffers: an update takes the memory of two buckets and of one joined tensor. Twice in each
round the lanes meet: when the last round has arrived everywhere, and when the next one has begun. The lane of
rank 0 calls the engines, and tells the others at a meeting when to stop.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from treepo.config.weights import WeightsConfig
from treepo.errors import DeadEngineError, EngineError, TransportError, one_line
from treepo.weight_sync.broadcast import BroadcastSender
from treepo.weight_sync.colocated import ColocatedSender
from treepo.weight_sync.disk import DiskSender
from treepo.weight_sync.lanes import Round, Source
from treepo.weight_sync.shards import part_bounds, pieces
from treepo.weight_sync.wire import (
    Address,
    Bucket,
    Manifest,
    Remark,
    Sender,
    Shards,
    TensorInfo,
    checksums,
)

_GRACE_SECONDS = 10.0  # an engine reports a missed deadline a little after it


class WeightSink(Protocol):
    """One engine, as trainer rank 0 uses it. Calls return at once; their futures fail with EngineError."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str:
        """Identifies the process: an engine that is restarted keeps its name and changes its key."""
        ...

    @property
    def ranks(self) -> int:
        """The engine's ranks. Each receives every bucket."""
        ...

    def join(self, addresses: Sequence[Address]) -> "Future[None]":
        """Connect every rank to the sender of each lane."""
        ...

    def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
        """Receive each lane's bucket of a round, None if it has none, and overwrite the weights in it."""
        ...


@dataclass(slots=True)
class Outcome:
    """The outcome of sending one version.

    failed: the error of each engine at fault, by the engine's name. broken: why the other engines must begin
    again; None if they need not. remarks: the transport's, for the run's log.
    """

    failed: dict[str, EngineError] = field(default_factory=dict)
    broken: str | None = None
    remarks: list[Remark] = field(default_factory=list)


def open_sender(config: WeightsConfig, out: Path, host: str, seconds: float) -> Sender:
    """Open a trainer rank's end of the configured transport.

    out: the run folder. host: an address of this machine that the engines reach. seconds: deadline of a step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match config.transport:
        case "colocated":
            return ColocatedSender(device)
        case "broadcast":
            return BroadcastSender(device, host, seconds)
        case "host_broadcast":
            return BroadcastSender(torch.device("cpu"), host, seconds, delta=config.delta)
        case "disk":
            folder = (config.folder or out / "weights").resolve()
            return DiskSender(folder, config.keep, config.full_every if config.delta else None)


class WeightStream:
    """One source's lane, update after update, to engines that may change in between.

    size: bytes of a bucket. seconds: deadline of each step.
    """

    def __init__(self, sender: Sender, size: int, seconds: float) -> None:
        self._sender, self._size, self._seconds = sender, size, seconds
        self._joined: tuple[str, ...] = ()
        self._readers: Sequence[Shards | None] = ()  # what each group of the engines' ranks reads

    def send(self, source: Source, version: int, sinks: Sequence[WeightSink]) -> Outcome:
        """Send every tensor of the lane once. It is called and returns in all lanes; the outcome is lane 0's.

        All rounds are read, because the trainer's ranks give each other their shards in every one. An engine
        that fails is left out from then on. If the transport is a collective, one failure breaks it: nothing
        more is sent in any lane, and the engines that are not at fault must begin again. Raises
        TransportError if the transport's folder cannot be written.
        """
        rounds = source.rounds(self._size)
        update = _Update(source, self._sender, self._seconds, sinks)
        try:
            self._send(update, rounds, version)
        except _StoppedError:
            self.close()
            _drain(rounds)
            update.remark(self._sender.take_remarks())
        except BaseException as error:
            self.close()
            if not update.in_collective:
                update.stop(f"lane {update.lane}: {one_line(error) or type(error).__name__}")
                _drain(rounds)
            if isinstance(error, OSError):  # a full disk, a read-only folder
                raise TransportError(f"weights of version {version}: {error}") from error
            raise
        return update.outcome

    def _send(
        self, update: "_Update", rounds: Iterator[tuple[Round, Iterator[tuple[str, Tensor]]]], version: int
    ) -> None:
        self._join(update)
        for index, (planned, tensors) in enumerate(update.rounds(rounds)):
            bucket = self._filled(update, index, planned[update.lane], tensors)
            update.settle()
            update.load(bucket and self._started(index, *bucket))
        update.settle()
        self._sender.end(version)
        for remarks in update.meet(self._sender.take_remarks()):
            update.remark(remarks)

    def close(self) -> None:
        """Release the transport. The next update opens it again."""
        self._joined = ()
        self._sender.close()

    def _join(self, update: "_Update") -> None:
        """Connect the engines to every lane, unless all lanes have those of the last update."""
        if not any(update.meet(update.keys != self._joined)):
            return
        self.close()
        self._readers = update.join()
        if not update.outcome.failed:
            self._joined = update.keys

    def _filled(
        self, update: "_Update", index: int, mine: Manifest, tensors: Iterator[tuple[str, Tensor]]
    ) -> tuple[Tensor, Manifest, tuple[tuple[int, ...], ...]] | None:
        """Join this lane's tensors of a round into a buffer, and give the other lanes their shards."""
        if not mine:
            with update.collective():
                assert next(tensors, None) is None
            return None
        bounds = part_bounds(mine, self._readers)
        try:
            flat = self._sender.buffer(index, bounds[-1][1])
        except BaseException:
            with update.collective():  # the other lanes wait for this one's shards before they meet
                deque(tensors, maxlen=0)
            raise
        parts = [flat[start:end] for start, end in bounds]
        with update.collective():
            _fill(parts, mine, self._readers, tensors)
        sums = tuple(map(checksums, parts))
        self._sender.filled(index, flat, mine)
        return flat, mine, sums

    def _started(self, index: int, flat: Tensor, mine: Manifest, sums: tuple[tuple[int, ...], ...]) -> Bucket:
        return Bucket(mine, sums, self._sender.start(index, flat, mine))


class _StoppedError(Exception):
    """No lane sends any more in this update."""


class _Update:
    """One update as one lane sees it: what the lanes tell each other, and in lane 0 the engines.

    in_collective: whether this rank is in a collective of the trainer's ranks; if that fails, nothing can be
    agreed with them.
    """

    def __init__(self, source: Source, sender: Sender, seconds: float, sinks: Sequence[WeightSink]) -> None:
        assert source.lane is not None
        self.lane, self.outcome, self.in_collective = source.lane, Outcome(), False
        self.keys = tuple(sink.key for sink in sinks)
        self._source, self._sender, self._seconds = source, sender, seconds
        self._ranks = [sink.ranks for sink in sinks]
        self._live = {sink.name: sink for sink in sinks}
        self._calls: Mapping[str, Future[None]] = {}  # to the engines; only in lane 0
        self._travelling = False

    @contextmanager
    def collective(self) -> Iterator[None]:
        self.in_collective = True
        yield
        self.in_collective = False  # not after a failure

    def rounds[T](self, rounds: Iterator[T]) -> Iterator[T]:
        """The same, each of which takes the trainer's ranks."""
        while True:
            with self.collective():
                following = next(rounds, None)
            if following is None:
                return
            yield following

    def meet[T](self, said: T = None, stop: str | None = None) -> list[T]:
        """What every lane says. If a lane says why to stop, all raise _StoppedError."""
        with self.collective():
            words = self._source.exchange((stop, said))
        for lane, (reason, _) in enumerate(words):
            if reason is not None:
                if lane > 0:
                    self.outcome.broken = self.outcome.broken or reason
                raise _StoppedError
        return [word for _, word in words]

    def remark(self, remarks: Sequence[Remark]) -> None:
        """Keep what a lane's transport has to say, once if several say the same."""
        self.outcome.remarks += [one for one in remarks if one not in self.outcome.remarks]

    def stop(self, reason: str) -> None:
        """Tell the others, who wait for this lane, that it has failed."""
        with suppress(_StoppedError):
            self.meet(None, reason)

    def join(self) -> Sequence[Shards | None]:
        """Connect the engines to every lane. Returns what each group of their ranks reads of this lane."""
        addresses = self.meet(self._sender.addresses(self._ranks))
        if self.lane == 0:
            self._calls = {
                sink.name: sink.join(of_engine)
                for sink, *of_engine in zip(self._live.values(), *addresses, strict=True)
            }
        readers: list[Shards | None] = []
        self._settle(lambda: readers.extend(self._sender.connect(self._source.share)))
        return readers

    def load(self, bucket: Bucket | None) -> None:
        """Have the engines receive the bucket that this lane has begun to send, and those of the others."""
        buckets = self.meet(bucket)
        self._travelling = True
        if self.lane == 0:
            self._calls = {name: sink.load(buckets) for name, sink in self._live.items()}

    def settle(self) -> None:
        """Wait until the last round is loaded everywhere."""
        if self._travelling:
            self._settle(self._sender.finish)

    def _settle(self, ours: Callable[[], None]) -> None:
        """Wait for this lane's end of the transport, the engines (in lane 0), and then the other lanes."""
        deadline = time.monotonic() + self._seconds + _GRACE_SECONDS
        stop = None
        try:
            ours()
        except RuntimeError as error:  # what torch's process groups raise
            stop = f"the trainer's end of the transport: {error}"
        if self.lane == 0:
            self.outcome.broken = stop
            self._collect(deadline)
            stop = self.outcome.broken or (None if self._live else "no engine is left")
        self.meet(None, stop)

    def _collect(self, deadline: float) -> None:
        """Wait for the engines' answers, and remove engines that failed."""
        calls, self._calls = self._calls, {}
        wait(calls.values(), timeout=max(0.0, deadline - time.monotonic()))
        failures = {name: failure for name, call in calls.items() if (failure := self._failure(call))}
        collective = self._sender.collective
        # An engine that only lost a collective is not at fault: another one broke it.
        at_fault = {
            name: failure
            for name, failure in failures.items()
            if not (collective and isinstance(failure, TransportError))
        }
        self.outcome.failed |= at_fault
        for name in at_fault:
            del self._live[name]
        if collective and (at_fault or (failures and self.outcome.broken is None)):
            said = at_fault or failures
            self.outcome.broken = "; ".join(f"{name}: {failure}" for name, failure in said.items())

    def _failure(self, call: "Future[None]") -> EngineError | None:
        if not call.done():
            return DeadEngineError(f"no answer within {self._seconds:g} s")
        error = call.exception()
        if error is None or isinstance(error, EngineError):
            return error
        raise error


def _drain(rounds: Iterator[tuple[Round, Iterator[tuple[str, Tensor]]]]) -> None:
    """Give the other lanes this rank's shards of all rounds that are left, and forget what it joins."""
    for _, tensors in rounds:
        deque(tensors, maxlen=0)


def _fill(
    parts: Sequence[Tensor],
    planned: Manifest,
    readers: Sequence[Shards | None],
    source: Iterator[tuple[str, Tensor]],
) -> None:
    """Write what each group of ranks reads of the tensors of `source`, which must be the planned ones.

    Each tensor is let go before the next is gathered.
    """
    starts = [0] * len(parts)

    def write(info: TensorInfo, name: str, tensor: Tensor) -> None:
        assert TensorInfo.of(name, tensor) == info, (name, tensor.shape, tensor.dtype, info)
        for index, (part, shards) in enumerate(zip(parts, readers, strict=True)):
            for piece in pieces(tensor, name, shards):
                end = starts[index] + piece.nbytes
                _write(part[starts[index] : end], piece)
                starts[index] = end

    for info in planned:
        write(info, *next(source))
    assert next(source, None) is None, "more tensors than were planned"


def _write(place: Tensor, piece: Tensor) -> None:
    if place.data_ptr() % piece.dtype.itemsize == 0:
        place.view(piece.dtype).view(piece.shape).copy_(piece)
    else:
        place.copy_(piece.contiguous().flatten().view(torch.uint8))
