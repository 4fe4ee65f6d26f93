"""Fake engines for the tests of transports: threads that receive weights, check them and keep them."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import torch
from torch import Tensor

from treepo.errors import TransportError
from treepo.weight_sync.receive import RankReceiver
from treepo.weight_sync.send import Outcome
from treepo.weight_sync.shards import whole
from treepo.weight_sync.wire import Address, Bucket, Manifest, Shards

CPU = torch.device("cpu")
_keys = count()


def reads_all(share: Manifest) -> Shards:
    """What a rank reads that takes every tensor whole."""
    return {info.name: whole(info) for info in share}


def reasons(outcome: Outcome) -> dict[str, str]:
    """What the engines at fault say, by their names."""
    return {name: str(error) for name, error in outcome.failed.items()}


class FakeSink:
    """Implements `treepo.weight_sync.send.WeightSink` with one thread for each rank.

    received: each rank's tensors of this update, by name. fault: called by every rank with "join" or the
    number of a round; what it raises is the answer. device: of every rank.
    """

    def __init__(
        self,
        name: str,
        ranks: int = 1,
        fault: Callable[[str | int], None] = lambda _: None,
        device: torch.device = CPU,
    ) -> None:
        self.name, self.ranks, self.fault, self._device = name, ranks, fault, device
        self.key = str(next(_keys))
        self.reads: Callable[[int, Manifest], Shards] = lambda _, share: reads_all(share)
        self.received: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        self._receivers = [RankReceiver() for _ in range(ranks)]
        self._threads = [ThreadPoolExecutor(1) for _ in range(ranks)]  # in order, like SGLang's processes
        self._collector = ThreadPoolExecutor(1)
        self._rounds = 0

    def forget(self) -> None:
        """Begin another update: nothing is received yet."""
        self._rounds = 0
        self.received = [{} for _ in range(self.ranks)]

    def join(self, addresses: Sequence[Address]) -> "Future[None]":
        def obey(rank: int) -> None:
            self._receivers[rank].close()
            self.fault("join")
            self._receivers[rank].join(addresses, rank, self._device, lambda share: self.reads(rank, share))

        self.forget()
        return self._all(obey)

    def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
        number, self._rounds = self._rounds, self._rounds + 1

        def obey(rank: int) -> None:
            self.fault(number)
            self._receivers[rank].load(buckets, lambda tensors: self._keep(rank, tensors))

        return self._all(obey)

    def _keep(self, rank: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            assert name not in self.received[rank], f"{name} came twice"
            self.received[rank][name] = tensor.clone()

    def close(self) -> None:
        for receiver in self._receivers:
            receiver.close()
        for thread in (*self._threads, self._collector):
            thread.shutdown()

    def _all(self, obey: Callable[[int], None]) -> "Future[None]":
        """Done once every rank has obeyed; fails with the first error of a rank that is at fault itself, or
        else with the first of one that lost a transfer.
        """
        calls = [thread.submit(obey, rank) for rank, thread in enumerate(self._threads)]

        def collect() -> None:
            errors = [error for call in calls if (error := call.exception())]
            for error in sorted(errors, key=lambda error: isinstance(error, TransportError)):
                raise error

        return self._collector.submit(collect)
