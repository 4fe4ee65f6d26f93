"""A process that receives weights as an engine's rank does, verifies their checksums, and loads nothing."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.limited_links import Host
from treepo.errors import EngineError
from treepo.weight_sync.receive import RankReceiver
from treepo.weight_sync.shards import whole
from treepo.weight_sync.wire import Address, Box, Bucket, Manifest, Receiver, Shards, TensorInfo


@dataclass(frozen=True, slots=True)
class _Rows:
    """Reads one of `parts` equal parts of the rows of every matrix."""

    rank: int
    parts: int

    def __call__(self, share: Manifest) -> Shards:
        return {info.name: self._box(info) if self.parts > 1 else whole(info) for info in share}

    def _box(self, info: TensorInfo) -> tuple[Box, ...]:
        rows, *others = info.shape
        start, stop = (index * rows // self.parts for index in (self.rank, self.rank + 1))
        box: Box = ((start, stop), *((0, size) for size in others))
        return (box,)


def serve_as_sink(orders: Any, device: torch.device, part: tuple[int, int], host: Host) -> None:
    """Obey orders until None arrives. Each is answered with an error, empty if there is none."""
    host.enter()
    torch.set_num_threads(1)
    receiver, reads = RankReceiver(), _Rows(*part)
    raw: Any = None
    while (order := orders.recv()) is not None:
        action, argument = order
        error = ""
        try:
            if action == "join":
                receiver.join(argument, part[0], device, reads)
            elif action == "end":
                receiver.end()
            elif action == "load":
                receiver.load(argument, lambda _: None)
            elif action == "join raw":
                raw = argument.join(0, device, reads)
            elif action == "copy raw":
                _copy([raw], [argument])
            elif action == "copy":
                _copy(receiver._lanes, argument)
        except (EngineError, RuntimeError, OSError) as raised:
            error = str(raised)
        orders.send(error)


def _copy(lanes: Sequence[Receiver], buckets: Sequence[Bucket]) -> None:
    """Receive all lanes' bytes, without a look at them."""
    for lane, bucket in zip(lanes, buckets, strict=True):
        lane.begin(bucket)
    for lane, bucket in zip(lanes, buckets, strict=True):
        lane.receive(bucket).clone()


class ProcessSink:
    """Implements `treepo.weight_sync.send.WeightSink` with one rank. device: where the process receives.
    part: which part of the rows it reads, and of how many. host: where it runs.
    """

    ranks = 1

    def __init__(
        self,
        name: str,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
        host: Host = Host("", "127.0.0.1"),  # noqa: B008  it is immutable
    ) -> None:
        self.name = self.key = name
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=serve_as_sink, args=(theirs, device, part, host), daemon=True)
        self._process.start()
        theirs.close()  # so that the death of the process ends a wait
        self._thread = ThreadPoolExecutor(1)
        self.order("start").result()

    def join(self, addresses: Sequence[Address]) -> "Future[None]":
        return self.order("join", addresses)

    def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
        return self.order("load", buckets)

    def order(self, action: str, argument: Any = None) -> "Future[None]":
        """Done when the process has obeyed; fails with EngineError."""

        def obey() -> None:
            try:
                self._ours.send((action, argument))
                error = self._ours.recv()
            except (EOFError, OSError):
                error = f"{self.name}: its process died, with a traceback on standard error"
            if error:
                raise EngineError(error)

        return self._thread.submit(obey)

    def close(self) -> None:
        with suppress(BrokenPipeError):  # of a process that died, whose traceback is on standard error
            self._ours.send(None)
        self._process.join()
        self._thread.shutdown()
