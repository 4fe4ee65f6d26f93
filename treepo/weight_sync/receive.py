"""An engine rank's half of a weight sync: receive a round's buckets from all lanes, check and load them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from treepo.errors import EngineError, TransportError, one_line
from treepo.weight_sync.shards import views
from treepo.weight_sync.wire import Address, Bucket, Reads, Receiver, checksums

Load = Callable[[list[tuple[str, Tensor]]], None]
"""Overwrites weights by their Hugging Face names."""


class RankReceiver:
    """One engine rank's ends of all lanes. Methods raise TransportError, and EngineError if this rank is at
    fault.
    """

    def __init__(self) -> None:
        self._lanes: list[Receiver] = []

    def join(self, addresses: Sequence[Address], rank: int, device: torch.device, reads: Reads) -> None:
        """Connect to each lane's sender, in the order of the lanes as every rank does. reads: finds what the
        rank's loader reads.
        """
        self.close()
        for address in addresses:
            joined = _transferred(lambda: address.join(rank, device, reads))  # noqa: B023  called at once
            self._lanes.append(joined)

    def load(self, buckets: Sequence[Bucket | None], load: Load) -> None:
        """Receive each lane's bucket of a round, None if it has none, and load what is in them."""
        if len(self._lanes) != len(buckets):
            raise TransportError("a bucket arrived before the rank joined the senders")
        sending = [(lane, bucket) for lane, bucket in zip(self._lanes, buckets, strict=True) if bucket]
        for lane, bucket in sending:
            _transferred(lambda: lane.begin(bucket))  # noqa: B023  called at once
        for lane, bucket in sending:
            flat = _transferred(lambda: lane.receive(bucket))  # noqa: B023  called at once
            stripes = lane.stripes(bucket)
            if checksums(flat, stripes) != bucket.checksums[lane.part][stripes]:
                raise EngineError(f"a bucket of {len(flat)} bytes arrived with another checksum")
            load(list(views(flat, bucket.tensors, lane.shards)))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # senders write the next buckets over these

    def end(self) -> None:
        """Release the memory that only an update needs."""
        for lane in self._lanes:
            lane.end()

    def close(self) -> None:
        while self._lanes:
            self._lanes.pop().close()


def _transferred[T](transfer: Callable[[], T]) -> T:
    """Run a transfer. Its errors become TransportErrors, which say nothing of whose fault it is; a lack of
    memory is this rank's.
    """
    try:
        return transfer()
    except torch.OutOfMemoryError as error:
        raise EngineError(
            "no memory for the weights that arrive: a smaller weights.bucket_mb or engine.memory_fraction "
            f"leaves more ({one_line(error)})"
        ) from error
    except (RuntimeError, OSError) as error:
        raise TransportError(str(error)) from error
