"""A process that receives weights as an engine's rank does, verifies their checksums, and loads nothing."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from treepo.errors import EngineError
from treepo.weight_sync.receive import RankReceiver
from treepo.weight_sync.shards import whole
from treepo.weight_sync.wire import Address, Bucket, Manifest, Shards


def _reads_all(share: Manifest) -> Shards:
    return {info.name: whole(info) for info in share}


def serve_as_sink(orders: Any, device: torch.device) -> None:
    """Obey orders until None arrives. Each is answered with an error, empty if there is none."""
    torch.set_num_threads(1)
    receiver = RankReceiver()
    raw: Any = None
    while (order := orders.recv()) is not None:
        action, argument = order
        error = ""
        try:
            if action == "join":
                receiver.join(argument, 0, device, _reads_all)
            elif action == "end":
                receiver.end()
            elif action == "load":
                receiver.load(argument, lambda _: None)
            elif action == "join raw":
                raw = argument.join(0, device, _reads_all)
            elif action == "copy":
                raw.begin(argument)
                raw.receive(argument).clone()
        except (EngineError, RuntimeError, OSError) as raised:
            error = str(raised)
        orders.send(error)


class ProcessSink:
    """Implements `treepo.weight_sync.send.WeightSink`. device: where the process receives."""

    ranks = 1

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = self.key = name
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=serve_as_sink, args=(theirs, device), daemon=True)
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
