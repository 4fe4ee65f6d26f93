"""The trainer's weights as its ranks send them to engines: implements `treepo.weight_sync.lanes.Source`."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, zip_longest

import torch.distributed as dist
from torch import Tensor

from megatron_bridge.weight_transfer import Gathering, WeightExporter
from treepo.weight_sync.lanes import Round, by_size, deal, source_ranks
from treepo.weight_sync.wire import Manifest, plan_buckets


class WeightSource:
    """One rank's part in sending the weights. Made on all ranks at once, because they form a group.

    readable: makes the parameters readable while its body runs. lanes: the most that there may be. one_host:
    whether all sources must be on rank 0's host.
    """

    def __init__(
        self,
        exporter: WeightExporter,
        readable: Callable[[], AbstractContextManager[None]],
        lanes: int,
        one_host: bool,
    ) -> None:
        self._exporter, self._readable = exporter, readable
        ranks = [
            rank for rank, host in enumerate(exporter.hosts) if host == exporter.hosts[0] or not one_host
        ]
        self._sources = source_ranks(ranks, lanes)
        self._group = dist.new_group(self._sources, backend="gloo") if len(self._sources) > 1 else None
        self._shares = _shares(exporter, self._sources)
        self.lanes = len(self._sources)
        rank = dist.get_rank()
        self.lane = self._sources.index(rank) if rank in self._sources else None
        self.share = _infos(self._shares[self.lane]) if self.lane is not None else ()

    def rounds(self, size: int) -> Iterator[tuple[Round, Iterator[tuple[str, Tensor]]]]:
        buckets = (plan_buckets(share, size) for share in self._shares)
        with self._readable():
            for planned in zip_longest(*buckets, fillvalue=()):
                tensors = self._gather(planned)
                yield tuple(map(_infos, planned)), tensors
                deque(tensors, maxlen=0)  # which holds none while the next is gathered

    def exchange[T](self, mine: T) -> list[T]:
        if self._group is None:
            return [mine]
        everyone = [mine] * self.lanes
        dist.all_gather_object(everyone, mine, self._group)
        return everyone

    def _gather(self, planned: Sequence[Sequence[Gathering]]) -> Iterator[tuple[str, Tensor]]:
        """Yield this lane's tensors of a round. All lanes gather their next parameter at the same time."""
        for step in zip_longest(*planned):
            joined = self._exporter.gather([one for one in step if one is not None])
            yield from joined
            del joined  # frees it before the next parameter is gathered


def _infos(gatherings: Sequence[Gathering]) -> Manifest:
    return tuple(chain.from_iterable(gathering.infos for gathering in gatherings))


def _shares(exporter: WeightExporter, sources: Sequence[int]) -> list[list[Gathering]]:
    """What each source joins and sends, in that order: parameters of which it holds a shard, if it can."""
    rules = exporter.rules
    sizes = [sum(info.nbytes for info in exporter.infos(rule)) for rule in rules]
    lanes = range(len(sources))
    able = [
        [lane for lane in lanes if sources[lane] in holders] or lanes
        for holders in map(exporter.holders, rules)
    ]
    chosen = deal(sizes, able)
    shares: list[list[Gathering]] = [[] for _ in sources]
    for index in by_size(sizes):
        shares[chosen[index]].append(exporter.gathering(rules[index], sources[chosen[index]]))
    return shares
