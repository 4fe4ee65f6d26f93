"""Fake engines for the tests of transports: threads that receive weights, check them and keep them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import torch
from torch import Tensor

from treepo.errors import EngineError, TransportError
from treepo.weight_sync.wire import Address, Bucket, Receiver, checksums, views

CPU = torch.device("cpu")
_keys = count()


class FakeSink:
    """Implements `treepo.weight_sync.send.WeightSink` with one thread for each rank.

    received: each rank's tensors of this update, by name. fault: called by every rank with "join" or the
    number of a bucket; what it raises is the answer. device: of every rank.
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
        self.received: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        self._receivers: list[Receiver | None] = [None] * ranks
        self._threads = [ThreadPoolExecutor(1) for _ in range(ranks)]  # in order, like SGLang's processes
        self._collector = ThreadPoolExecutor(1)
        self._buckets = 0

    def forget(self) -> None:
        """Begin another update: nothing is received yet."""
        self._buckets = 0
        self.received = [{} for _ in range(self.ranks)]

    def join(self, address: Address) -> "Future[None]":
        def obey(rank: int) -> None:
            self.fault("join")
            self._receivers[rank] = _moved(lambda: address.join(rank, self._device))

        self.forget()
        return self._all(obey)

    def load(self, bucket: Bucket) -> "Future[None]":
        number, self._buckets = self._buckets, self._buckets + 1

        def obey(rank: int) -> None:
            self.fault(number)
            receiver = self._receivers[rank]
            assert receiver is not None
            flat = _moved(lambda: receiver.receive(bucket))
            stripes = receiver.stripes(bucket)
            if checksums(flat, stripes) != bucket.checksums[stripes]:
                raise EngineError("checksum")
            self.received[rank] |= {name: tensor.clone() for name, tensor in views(flat, bucket.tensors)}

        return self._all(obey)

    def close(self) -> None:
        for receiver in self._receivers:
            if receiver is not None:
                receiver.close()
        for thread in (*self._threads, self._collector):
            thread.shutdown()

    def _all(self, obey: Callable[[int], None]) -> "Future[None]":
        """Done once every rank has obeyed; fails with the first rank's error."""
        calls = [thread.submit(obey, rank) for rank, thread in enumerate(self._threads)]

        def collect() -> None:
            errors = [error for call in calls if (error := call.exception())]
            if errors:
                raise errors[0]

        return self._collector.submit(collect)


def _moved[T](transfer: Callable[[], T]) -> T:
    try:
        return transfer()
    except (RuntimeError, OSError) as error:
        raise TransportError(str(error)) from error
