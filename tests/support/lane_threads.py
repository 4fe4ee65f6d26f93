"""Several lanes of a weight sync as threads of the test's process."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from torch import Tensor

from treepo.weight_sync.lanes import Round, by_size, deal
from treepo.weight_sync.send import Outcome, WeightSink, WeightStream
from treepo.weight_sync.wire import Manifest, TensorInfo, plan_buckets

SECONDS = 60.0  # far more than any meeting takes


class ThreadSource:
    """Implements `treepo.weight_sync.lanes.Source`. Gathering a step waits for all lanes, like collectives of
    the trainer's ranks do, and so does an exchange; one does not stand for the other.

    gathered: called with the lane and the tensor's name before it is yielded.
    """

    def __init__(self, lane: int, shares: Sequence[Mapping[str, Tensor]], shared: "Shared") -> None:
        self.lane, self.lanes, self.share = lane, len(shares), manifest_of(shares[lane])
        self._shares, self.shared = shares, shared
        self.gathered: Callable[[int, str], None] = lambda *_: None

    def rounds(self, size: int) -> Iterator[tuple[Round, Iterator[tuple[str, Tensor]]]]:
        buckets = [plan_buckets(manifest_of(share), size) for share in self._shares]
        for planned in zip_longest(*buckets, fillvalue=()):
            tensors = self._gather(planned)
            yield planned, tensors
            for _ in tensors:
                pass

    def _gather(self, planned: Round) -> Iterator[tuple[str, Tensor]]:
        for step in zip_longest(*planned):
            self.shared.gathering.wait(SECONDS)
            info = step[self.lane]
            if info is not None:
                self.gathered(self.lane, info.name)
                yield info.name, self._shares[self.lane][info.name]

    def exchange[T](self, mine: T) -> list[T]:
        self.shared.table[self.lane] = mine
        self.shared.meeting.wait(SECONDS)
        everyone = list(self.shared.table)
        self.shared.meeting.wait(SECONDS)
        return everyone


class Shared:
    """What the sources of all lanes have in common."""

    def __init__(self, lanes: int) -> None:
        self.table: list[Any] = [None] * lanes
        self.gathering, self.meeting = threading.Barrier(lanes), threading.Barrier(lanes)

    def abort(self) -> None:
        """As if a rank were gone."""
        self.gathering.abort()
        self.meeting.abort()


def manifest_of(tensors: Mapping[str, Tensor]) -> Manifest:
    return tuple(TensorInfo.of(name, tensor) for name, tensor in tensors.items())


def thread_sources(model: Mapping[str, Tensor], lanes: int) -> list[ThreadSource]:
    """A source for each lane; the tensors are dealt out by size."""
    infos = manifest_of(model)
    sizes = [info.nbytes for info in infos]
    chosen = deal(sizes, [range(lanes)] * len(infos))
    shares: list[dict[str, Tensor]] = [{} for _ in range(lanes)]
    for index in by_size(sizes):
        shares[chosen[index]][infos[index].name] = model[infos[index].name]
    shared = Shared(lanes)
    return [ThreadSource(lane, shares, shared) for lane in range(lanes)]


def send_in_lanes(
    streams: Sequence[WeightStream],
    sources: Sequence[ThreadSource],
    sinks: Sequence[WeightSink],
    version: int = 1,
) -> list[Outcome | BaseException]:
    """What each lane returns or raises."""
    with ThreadPoolExecutor(len(streams)) as lanes:
        calls = [
            lanes.submit(stream.send, source, version, sinks)
            for stream, source in zip(streams, sources, strict=True)
        ]
    return [call.exception() or call.result() for call in calls]
