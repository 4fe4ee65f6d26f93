"""Engines of threads for the tests of transports: they receive, check and keep what a real one would load."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import torch
from torch import Tensor

from treepo.errors import EngineError, TransportError
from treepo.weight_sync.wire import Address, Bucket, Receiver, checksum, views

CPU = torch.device("cpu")
_keys = count()


class FakeSink:
    """A `treepo.weight_sync.send.Sink` of `ranks` threads. received: by rank, the tensors by name.

    fault: called with "join" or the number of a bucket before every rank obeys; what it raises is the answer.
    """

    def __init__(
        self, name: str, ranks: int = 1, fault: Callable[[str | int], None] = lambda _: None
    ) -> None:
        self.name, self.ranks, self.fault = name, ranks, fault
        self.key = str(next(_keys))
        self.received: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        self._receivers: list[Receiver | None] = [None] * ranks
        self._threads = [ThreadPoolExecutor(1) for _ in range(ranks)]  # in order, as SGLang's processes
        self._gather = ThreadPoolExecutor(1)
        self._buckets = 0

    def join(self, address: Address) -> "Future[None]":
        def obey(rank: int) -> None:
            self.fault("join")
            self._receivers[rank] = _moved(lambda: address.join(rank, CPU))

        self._buckets = 0
        self.received = [{} for _ in range(self.ranks)]
        return self._all(obey)

    def load(self, bucket: Bucket) -> "Future[None]":
        number, self._buckets = self._buckets, self._buckets + 1

        def obey(rank: int) -> None:
            self.fault(number)
            receiver = self._receivers[rank]
            assert receiver is not None
            flat = _moved(lambda: receiver.receive(bucket))
            if checksum(flat) != bucket.checksum:
                raise EngineError("checksum")
            self.received[rank] |= {name: tensor.clone() for name, tensor in views(flat, bucket.tensors)}

        return self._all(obey)

    def close(self) -> None:
        for receiver in self._receivers:
            if receiver is not None:
                receiver.close()
        for thread in (*self._threads, self._gather):
            thread.shutdown()

    def _all(self, obey: Callable[[int], None]) -> "Future[None]":
        """Done when every rank has obeyed; fails as the first that failed."""
        calls = [thread.submit(obey, rank) for rank, thread in enumerate(self._threads)]

        def gather() -> None:
            errors = [error for call in calls if (error := call.exception())]
            if errors:
                raise errors[0]

        return self._gather.submit(gather)


def _moved[T](transfer: Callable[[], T]) -> T:
    try:
        return transfer()
    except (RuntimeError, OSError) as error:
        raise TransportError(str(error)) from error
