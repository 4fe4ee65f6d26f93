"""Weight syncs by several sources, to engine ranks that read shards, against a raw copy. Prints JSON lines.

    OMP_NUM_THREADS=1 python -m benchmarks.weight_lanes --megabits 200
    OMP_NUM_THREADS=1 python -m benchmarks.weight_lanes --megabits 200 --changed 0.005

Sources and engine ranks are processes. With `--megabits` each is a host of its own, behind a link of that
rate (needs root, iproute2 and tc); without, all share this machine's loopback. A model of matrices goes by
gloo broadcasts from 1, 2 or 4 sources to engines whose ranks read all rows or their part of them. The raw
copy sends the same bytes by the same groups at once, in the same processes: no buckets, no checksums, no
meetings, no loading. Figures are medians of interleaved repeats; `largest_*` are the bytes that the busiest
source sends and the busiest rank receives, headers and copies to several ranks included. With `--changed`
that share of the weights changes before each update, by the last bit, and updates send deltas
(`weights.delta`); the raw copy still sends all bytes.
"""

import argparse
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import orjson
import torch
from torch import Tensor
from torch.distributed import BroadcastOptions

from benchmarks.limited_links import Host, limited_links
from benchmarks.sink_process import ProcessSink
from treepo.weight_sync.broadcast import BroadcastSender, InBroadcast
from treepo.weight_sync.lanes import Round, by_size, deal
from treepo.weight_sync.send import Outcome, WeightStream
from treepo.weight_sync.shards import part_bounds
from treepo.weight_sync.wire import Address, Bucket, Manifest, TensorInfo, plan_buckets

SECONDS = 60.0
CPU = torch.device("cpu")
COLUMNS = 1024


def manifest(megabytes: int) -> Manifest:
    """Matrices of 1 and 4 MiB in bfloat16."""
    rows = [512, 2048] * (megabytes // 5)
    return tuple(TensorInfo(f"m{index}", "bfloat16", (size, COLUMNS)) for index, size in enumerate(rows))


class PipeSource:
    """Implements `treepo.weight_sync.lanes.Source` for a lane in a process of its own. Each process makes its
    tensors; lane 0 passes on what the lanes tell each other. pipes: lane 0's to the others, or one to lane 0.
    """

    def __init__(self, lane: int, lanes: int, model: Manifest, pipes: Sequence[Any]) -> None:
        self.lane, self.lanes, self._pipes = lane, lanes, pipes
        sizes = [info.nbytes for info in model]
        chosen = deal(sizes, [range(lanes)] * len(model))
        order = by_size(sizes)
        self._shares = [tuple(model[i] for i in order if chosen[i] == each) for each in range(lanes)]
        self.share = self._shares[lane]
        self._random = torch.Generator().manual_seed(lane)
        self._tensors = {
            info.name: torch.randn(info.shape, generator=self._random, dtype=torch.bfloat16)
            for info in self.share
        }

    def rounds(self, size: int) -> Iterator[tuple[Round, Iterator[tuple[str, Tensor]]]]:
        for planned in zip_longest(*(plan_buckets(share, size) for share in self._shares), fillvalue=()):
            yield planned, ((info.name, self._tensors[info.name]) for info in planned[self.lane])

    def change(self, share: float) -> None:
        """Change the last bit of this share of the weights."""
        for tensor in self._tensors.values():
            chosen = torch.rand(tensor.shape, generator=self._random) < share
            tensor.view(torch.int16).bitwise_xor_(chosen.to(torch.int16))

    def exchange[T](self, mine: T) -> list[T]:
        if self.lane > 0:
            self._pipes[0].send(mine)
            return self._pipes[0].recv()
        everyone = [mine, *(pipe.recv() for pipe in self._pipes)]
        for pipe in self._pipes:
            pipe.send(everyone)
        return everyone


@dataclass
class Engine:
    """Implements `treepo.weight_sync.send.WeightSink` with a process for each rank."""

    name: str
    processes: list[ProcessSink]

    @property
    def key(self) -> str:
        return self.name

    @property
    def ranks(self) -> int:
        return len(self.processes)

    def join(self, addresses: Sequence[Address]) -> "Future[None]":
        return self.order("join", addresses)

    def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
        return self.order("load", buckets)

    def order(self, action: str, argument: Any) -> "Future[None]":
        calls = [process.order(action, argument) for process in self.processes]
        done: Future[None] = Future()

        def wait() -> None:
            errors = [error for call in calls if (error := call.exception())]
            done.set_exception(errors[0]) if errors else done.set_result(None)

        threading.Thread(target=wait).start()
        return done


@dataclass(frozen=True)
class Described:
    """An engine as lanes other than 0 know it."""

    name: str
    key: str
    ranks: int


class Lane:
    """One source: sends updates and raw copies. changed: share of the weights before an update; 0: none, and
    updates send all bytes.
    """

    def __init__(self, source: PipeSource, host: Host, bucket: int, changed: float) -> None:
        self.source, self._changed = source, changed
        self.sender = BroadcastSender(CPU, host.address, SECONDS, delta=changed > 0)
        self.stream = WeightStream(self.sender, bucket, SECONDS)

    def prepare(self) -> None:
        if self._changed:
            self.source.change(self._changed)

    def update(self, engines: Sequence[Any]) -> None:
        outcome = self.stream.send(self.source, 1, engines)
        assert outcome == Outcome(remarks=outcome.remarks), outcome

    def raw(self, engines: Sequence[Engine]) -> None:
        """Send the share at once by the groups that an update has formed."""
        share = self.source.share
        bounds = part_bounds(share, self.stream._readers)
        flat = torch.zeros(bounds[-1][1], dtype=torch.uint8)
        self.source.exchange(None)
        works = [
            group.broadcast([flat[start:end]], BroadcastOptions())
            for group, (start, end) in zip(self.sender._groups, bounds, strict=True)
        ]
        location = InBroadcast(index=-1, deltas=(0,) * len(bounds))  # of no update
        buckets = self.source.exchange(Bucket(share, (), location))
        copying = [engine.order("copy", buckets) for engine in engines]
        for work in works:
            work.wait()
        for copied in copying:
            copied.result()


def serve_lane(
    host: Host, source: tuple[int, int, Manifest], bucket: int, changed: float, pipe: Any, orders: Any
) -> None:
    """A lane other than 0, in its process. source: the arguments of its PipeSource."""
    host.enter()
    torch.set_num_threads(1)
    each = Lane(PipeSource(*source, [pipe]), host, bucket, changed)
    while (order := orders.recv()) is not None:
        action, engines = order
        if action == "prepare":
            each.prepare()
        else:
            each.update(engines) if action == "update" else each.raw([])
        orders.send(None)


class Benchmark:
    """Lane 0 and all other processes of one setting. hosts: of the lanes, then of the engines' ranks."""

    def __init__(
        self,
        hosts: Sequence[Host],
        lanes: int,
        ranks: int,
        shards: bool,
        model: Manifest,
        bucket_mb: int,
        changed: float,
    ) -> None:
        self._stack, self._hosts, self._lanes = ExitStack(), hosts, lanes
        context = multiprocessing.get_context("spawn")
        pipes, self._orders = [], []
        bucket = (bucket_mb << 20) * (ranks if shards else 1) // lanes
        for lane in range(1, lanes):
            (ours, theirs), (order, orders) = context.Pipe(), context.Pipe()
            arguments = (hosts[lane], (lane, lanes, model), bucket, changed, theirs, orders)
            process = context.Process(target=serve_lane, args=arguments, daemon=True)
            process.start()
            self._stack.callback(process.join)
            self._stack.callback(order.send, None)
            pipes.append(ours)
            self._orders.append(order)
        of_ranks = iter(hosts[lanes:])
        parts = ranks if shards else 1
        self.engines = [
            Engine(
                f"engine {index}",
                [ProcessSink(f"rank {rank}", CPU, (rank, parts), next(of_ranks)) for rank in range(ranks)],
            )
            for index in range((len(hosts) - lanes) // ranks)
        ]
        for engine in self.engines:
            for process in engine.processes:
                self._stack.callback(process.close)
        self._lane = Lane(PipeSource(0, lanes, model, pipes), hosts[0], min(bucket, bucket_mb << 20), changed)

    def seconds(self, action: str) -> float:
        for order in self._orders:
            order.send(("prepare", None))
        self._lane.prepare()
        for order in self._orders:
            order.recv()
        described = [Described(engine.name, engine.key, engine.ranks) for engine in self.engines]
        start = time.perf_counter()
        for order in self._orders:
            order.send((action, described))
        (self._lane.update if action == "update" else self._lane.raw)(self.engines)
        for order in self._orders:
            order.recv()
        return time.perf_counter() - start

    def link_bytes(self) -> tuple[list[int], list[int]]:
        """What each source has sent, and each rank received."""
        counts = [host.link_bytes() for host in self._hosts]
        return [sent for sent, _ in counts[: self._lanes]], [got for _, got in counts[self._lanes :]]

    def close(self) -> None:
        self._stack.close()


def measure(settings: argparse.Namespace, lanes: int, ranks: int, shards: bool) -> dict[str, Any]:
    model = manifest(settings.megabytes)
    whole = sum(info.nbytes for info in model)
    with (
        limited_links(lanes + settings.engines * ranks, settings.megabits) as hosts,
        ThreadPoolExecutor(1) as thread,  # a thread of its own, because it moves to a host
    ):
        thread.submit(hosts[0].enter).result()
        arguments = (hosts, lanes, ranks, shards, model, settings.bucket_mb, settings.changed)
        benchmark = thread.submit(Benchmark, *arguments).result()
        thread.submit(benchmark.seconds, "update").result()  # connects
        before = benchmark.link_bytes()
        ours = [thread.submit(benchmark.seconds, "update").result()]
        after = benchmark.link_bytes()
        raw = [thread.submit(benchmark.seconds, "raw").result()]
        for _ in range(settings.repeats - 1):
            ours.append(thread.submit(benchmark.seconds, "update").result())
            raw.append(thread.submit(benchmark.seconds, "raw").result())
        thread.submit(benchmark.close).result()
    sent, received = ([b - a for a, b in zip(*each, strict=True)] for each in zip(before, after, strict=True))
    return {
        "benchmark": "weight_lanes",
        "sources": lanes,
        "engines": settings.engines,
        "ranks": ranks,
        "shards": shards,
        "changed": settings.changed,
        "seconds": statistics.median(ours),
        "raw_seconds": statistics.median(raw),
        "over_raw": statistics.median(base / mine for base, mine in zip(raw, ours, strict=True)),
        "model_bytes": whole,
        "largest_sent": max(sent),
        "largest_received": max(received),
        "megabits": settings.megabits,
        "bucket_mb": settings.bucket_mb,
        "repeats": settings.repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="of each engine")
    parser.add_argument("--megabytes", type=int, default=80, help="MiB of weights")
    parser.add_argument("--megabits", type=int, default=0, help="rate of each host's link; 0: no links")
    parser.add_argument("--bucket-mb", type=int, default=16)
    parser.add_argument("--changed", type=float, default=0.0, help="share of the weights; 0: no deltas")
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    for ranks in settings.ranks:
        for shards in (False, True):
            for lanes in settings.sources:
                record = measure(settings, lanes, ranks, shards)
                sys.stdout.buffer.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
