"""Divides a model's tensors among the trainer ranks that send them: the sources of a weight sync.

Each source has a lane: its own tensors, buckets and end of the transport. The sync goes in rounds; in round k
every lane sends its bucket k. Sizes are in bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from torch import Tensor

from treepo.config.weights import WeightsConfig
from treepo.weight_sync.wire import Manifest, plan_buckets

MOST_LANES = 8
"""As many as a node has network cards. On a GPU every lane takes a communicator's memory on each rank."""

Round = tuple[Manifest, ...]
"""The tensors of each lane's next bucket; empty for a lane that has sent all of its own."""


class Source(Protocol):
    """A model's weights as a trainer rank sees them.

    lanes: number of sources. lane: this rank's, None if the rank only gives its shards to the sources. Lane 0
    is rank 0's, which talks to the engines. share: the lane's tensors.
    """

    @property
    def lanes(self) -> int: ...
    @property
    def lane(self) -> int | None: ...
    @property
    def share(self) -> Manifest: ...

    def rounds(self, size: int) -> Iterator[tuple[Round, Iterator[tuple[str, Tensor]]]]:
        """Each round, and this lane's tensors of it in that order, in buckets of about `size`.

        Collective: all ranks of the trainer read every round to its end, then the next one.
        """
        ...

    def exchange[T](self, mine: T) -> list[T]:
        """What the sources give, in the order of their lanes. Collective among them."""
        ...


class LocalSource:
    """Implements `Source` for a process that has all tensors."""

    lanes, lane = 1, 0

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], manifest: Manifest) -> None:
        self._tensors, self.share = iter(tensors), manifest

    def rounds(self, size: int) -> Iterator[tuple[Round, Iterator[tuple[str, Tensor]]]]:
        for planned in plan_buckets(self.share, size):
            tensors = islice(self._tensors, len(planned))
            yield (planned,), tensors
            for _ in tensors:  # after a failure
                pass
        assert next(self._tensors, None) is None, "more tensors than the manifest names"

    def exchange[T](self, mine: T) -> list[T]:
        return [mine]


def lanes_of(config: WeightsConfig) -> int:
    """The most lanes of the configured transport. A folder has one writer."""
    return 1 if config.transport == "disk" else MOST_LANES


def on_one_host(config: WeightsConfig) -> bool:
    """Whether all sources must be on the engines' host, whose memory they share."""
    return config.transport == "colocated"


def lane_bucket(config: WeightsConfig, lanes: int, ranks: int) -> int:
    """Bytes of a lane's bucket, so that an engine rank receives about one `bucket_mb` in each round.

    ranks: of an engine. By a broadcast each receives its part only.
    """
    parts = ranks if config.transport in ("broadcast", "host_broadcast") else 1
    return min(parts, lanes) * (config.bucket_mb << 20) // lanes


def source_ranks(ranks: Sequence[int], lanes: int) -> list[int]:
    """The ranks that send, in the order of their lanes: at most `lanes` of `ranks`, spread evenly over
    stages, replicas and nodes.
    """
    count = min(len(ranks), lanes)
    return [ranks[lane * len(ranks) // count] for lane in range(count)]


def deal(sizes: Sequence[int], able: Sequence[Sequence[int]]) -> list[int]:
    """Choose a lane for each parameter, so that lanes get about equal bytes.

    sizes: of the parameters. able: the lanes that may send each. The largest parameter is dealt first, each
    to the lane with the fewest bytes so far.
    """
    loads = {lane: 0 for lanes in able for lane in lanes}
    chosen = [0] * len(sizes)
    for index in by_size(sizes):
        chosen[index] = min(able[index], key=lambda lane: (loads[lane], lane))
        loads[chosen[index]] += sizes[index]
    return chosen


def by_size(sizes: Sequence[int]) -> list[int]:
    """The indices of parameters in the order of sending: the largest first, so that the buckets of a round
    are about equal.
    """
    return sorted(range(len(sizes)), key=lambda index: -sizes[index])
