"""The trainer's half of a weight sync: fill buckets, send them, and find out which engine failed.

Runs on trainer rank 0, which has the joined tensors. While bucket k is sent and loaded, bucket k + 1 is
filled in the other of two buffers: an update takes the memory of two buckets and of one joined tensor.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from treepo.config.weights import WeightsConfig
from treepo.errors import EngineError, TransportError
from treepo.weight_sync.broadcast import BroadcastSender
from treepo.weight_sync.colocated import ColocatedSender
from treepo.weight_sync.disk import DiskSender
from treepo.weight_sync.wire import (
    Address,
    Bucket,
    Manifest,
    Remark,
    Sender,
    TensorInfo,
    checksums,
    plan_buckets,
)

_GRACE_SECONDS = 10.0  # an engine reports a missed deadline a little after it


class WeightSink(Protocol):
    """One engine, as the sending rank uses it. Calls return at once; their futures fail with EngineError."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str:
        """Identifies the process: an engine that is restarted keeps its name and changes its key."""
        ...

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks of the engine. Each receives every bucket."""
        ...

    def join(self, address: Address) -> "Future[None]":
        """Connect every rank to the sender."""
        ...

    def load(self, bucket: Bucket) -> "Future[None]":
        """Receive a bucket and overwrite the weights in it."""
        ...


@dataclass(slots=True)
class Outcome:
    """The outcome of sending one version.

    failed: the reason for each engine at fault, by name. broken: why the other engines must begin again; None
    if they need not. remarks: the transport's, for the run's log.
    """

    failed: dict[str, str] = field(default_factory=dict)
    broken: str | None = None
    remarks: list[Remark] = field(default_factory=list)


def open_sender(config: WeightsConfig, out: Path, host: str, seconds: float) -> Sender:
    """The trainer's end of the configured transport.

    out: the run folder. host: an address of this machine that the engines reach. seconds: deadline of a step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match config.transport:
        case "colocated":
            return ColocatedSender(device)
        case "broadcast":
            return BroadcastSender(device, host, seconds)
        case "host_broadcast":
            return BroadcastSender(torch.device("cpu"), host, seconds)
        case "disk":
            folder = (config.folder or out / "weights").resolve()
            return DiskSender(folder, config.keep, config.full_every if config.delta else None)


class WeightStream:
    """Sends a model's tensors, update after update, to engines that may change in between.

    size: bytes of a bucket. seconds: deadline of each step.
    """

    def __init__(self, sender: Sender, size: int, seconds: float) -> None:
        self._sender, self._size, self._seconds = sender, size, seconds
        self._joined: tuple[str, ...] = ()

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        manifest: Manifest,
        version: int,
        sinks: Sequence[WeightSink],
    ) -> Outcome:
        """Send every tensor once.

        `tensors` is always read to its end, because the trainer's other ranks send their shards of all
        tensors. An engine that fails is left out from then on. If the transport is a collective, one failure
        breaks it: nothing more is sent, and the engines that are not at fault must begin again. Raises
        TransportError if the transport's folder cannot be written.
        """
        source = iter(tensors)
        try:
            outcome = self._send(source, manifest, version, sinks)
        except BaseException as error:
            self.close()
            for _ in source:
                pass
            if isinstance(error, OSError):  # a full disk, a read-only folder
                raise TransportError(f"weights of version {version}: {error}") from error
            raise
        assert next(source, None) is None, "more tensors than the manifest names"
        return outcome

    def _send(
        self,
        source: Iterator[tuple[str, Tensor]],
        manifest: Manifest,
        version: int,
        sinks: Sequence[WeightSink],
    ) -> Outcome:
        outcome, live = Outcome(), {sink.name: sink for sink in sinks}
        self._join(live, outcome)
        travelling: Mapping[str, Future[None]] = {}
        for index, planned in enumerate(plan_buckets(manifest, self._size)):
            flat = self._sender.buffer(index, sum(tensor.nbytes for tensor in planned))
            _fill(flat, planned, source)
            sums = checksums(flat)
            self._sender.filled(index, flat)
            self._settle(travelling, live, outcome)
            if not live or outcome.broken:
                travelling = {}
                continue
            location = self._sender.start(index, flat, planned)
            bucket = Bucket(planned, sums, location)
            travelling = {name: sink.load(bucket) for name, sink in live.items()}
        self._settle(travelling, live, outcome)
        if live and not outcome.broken:
            self._sender.end(version)
        else:
            self.close()
        outcome.remarks += self._sender.take_remarks()
        return outcome

    def close(self) -> None:
        """Release the transport. The next update opens it again."""
        self._joined = ()
        self._sender.close()

    def _join(self, live: dict[str, WeightSink], outcome: Outcome) -> None:
        keys = tuple(sink.key for sink in live.values())
        if keys == self._joined:
            return
        self.close()
        addresses = self._sender.addresses([sink.ranks for sink in live.values()])
        joining = {
            sink.name: sink.join(address) for sink, address in zip(live.values(), addresses, strict=True)
        }
        self._settle(joining, live, outcome, self._sender.connect)
        if not outcome.failed and not outcome.broken:
            self._joined = keys

    def _settle(
        self,
        calls: Mapping[str, "Future[None]"],
        live: dict[str, WeightSink],
        outcome: Outcome,
        ours: Callable[[], None] | None = None,
    ) -> None:
        """Wait for the trainer's end of the transport and for the engines' answers.

        Removes engines that failed from `live`.
        """
        if not calls:
            return
        deadline = time.monotonic() + self._seconds + _GRACE_SECONDS
        try:
            (ours or self._sender.finish)()
        except RuntimeError as error:  # what torch's process groups raise
            outcome.broken = f"the trainer's end of the transport: {error}"
        wait(calls.values(), timeout=max(0.0, deadline - time.monotonic()))
        for name, call in calls.items():
            failure = self._failure(call)
            if failure is None:
                continue
            if self._sender.collective:
                outcome.broken = outcome.broken or f"{name}: {failure}"
            # An engine that only lost a collective is not at fault: another one broke it.
            if not (self._sender.collective and isinstance(failure, TransportError)):
                outcome.failed[name] = str(failure)
                del live[name]

    def _failure(self, call: "Future[None]") -> EngineError | None:
        if not call.done():
            return EngineError(f"no answer within {self._seconds:g} s")
        error = call.exception()
        if error is None or isinstance(error, EngineError):
            return error
        raise error


def _fill(flat: Tensor, planned: Manifest, source: Iterator[tuple[str, Tensor]]) -> None:
    """Write the next tensors of `source`, which must be the planned ones, into the bucket."""
    start = 0
    for info in planned:
        name, tensor = next(source)
        assert TensorInfo.of(name, tensor) == info, (name, tensor.shape, tensor.dtype, info)
        part = flat[start : start + info.nbytes]
        start += info.nbytes
        if part.data_ptr() % tensor.dtype.itemsize == 0:
            part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        else:
            part.copy_(tensor.contiguous().flatten().view(torch.uint8))
