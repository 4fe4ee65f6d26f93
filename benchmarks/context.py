"""A train step of packed trees at context 1, 2 and 4 on CPUs: a rank's work and memory against the ideal 1/n.

    OMP_NUM_THREADS=1 python -m benchmarks.context
    OMP_NUM_THREADS=1 python -m benchmarks.context --megabits 500 --ranks 2

Run it in the repository's root. The script writes a random model, and trains one pack that holds a whole tree
of 16 leaves. Every rank is a process of one thread, and the ranks meet over gloo. Each way of recomputation
gives one JSON line with, for each number n of context ranks:

work: CPU seconds of the busiest rank, times n, over those of the single rank. 1 is ideal. Other work on the
    machine disturbs it less than clock time.
memory: bytes of tensors beyond weights, gradients and optimizer state at the peak of a step on the fullest
    rank, times n, over those of the single rank.
time: clock seconds times n over those of the single rank; it means something if every rank has a core.
overlap: clock seconds over those of a step that gathers all keys and values before it attends to any. Both
    alternate; the median of the ratios. Below 1 is gained. With `--megabits` each rank is a host with a link
    of that rate, which needs root; without it they exchange through the machine's memory.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.limited_links import Host, limited_links
from benchmarks.packed_and_flat import Setting, work
from benchmarks.random_model import SHAPES, write_model
from benchmarks.train_step import MODEL, make_trainer, run_layout
from tests.support.live_bytes import LiveBytes
from treepo.config.trainer import ParallelConfig

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class Plan:
    """The measurements of one run. hosts: of each rank. results: where rank 0 writes them."""

    model: dict[str, int]
    setting: Setting
    ranks: list[int]
    repeats: int
    recompute: str
    hosts: list[Host]
    results: Path


def plan(arguments: argparse.Namespace, recompute: str, hosts: list[Host], results: Path) -> Plan:
    if arguments.dry_run:
        return Plan(SHAPES["tiny"], Setting(1, 8, 32, 8, 2, 512), [1, 2], 1, recompute, hosts, results)
    tokens = arguments.leaf_tokens
    setting = Setting(1, 64, tokens, 64, 2, 64 + 16 * tokens)
    return Plan(MODEL, setting, [1, *arguments.ranks], arguments.repeats, recompute, hosts, results)


def run_rank(rank: int, layout: ParallelConfig, folder: Path, plan: Plan, ports: Any) -> None:
    """Measure as one rank; rank 0 writes the largest of all ranks' seconds and bytes."""
    from megatron_bridge import attention

    plan.hosts[rank].enter()
    trainer = make_trainer(rank, layout, folder, ports, plan.recompute, plan.hosts[0].address)
    batch = work(plan.setting, plan.model["vocab_size"])
    packs = batch.packs["packed"]
    assert len(packs) == 1, "the tree is longer than the pack"

    def seconds(parts: int) -> tuple[float, float]:
        attention.PARTS = parts
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train_step(packs, 1.0, batch.denominator)
        return time.process_time() - cpu_start, time.perf_counter() - start

    live = LiveBytes()
    trainer.train_step(packs, 1.0, batch.denominator)  # warms up
    with live:
        trainer.train_step(packs, 1.0, batch.denominator)
    in_parts = attention.PARTS
    pairs = [(seconds(in_parts), seconds(1)) for _ in range(plan.repeats)]
    cpu_seconds, clock = (
        statistics.median(values) for values in zip(*(one for one, _ in pairs), strict=True)
    )
    overlap = statistics.median(one[1] / other[1] for one, other in pairs)
    largest = torch.tensor([cpu_seconds, clock, float(live.peak), overlap], dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if rank == 0:
        (plan.results / f"{layout.context}.json").write_text(json.dumps(largest.tolist()))
    trainer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--leaf-tokens", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=RECOMPUTE)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of context ranks")
    parser.add_argument("--megabits", type=int, default=0, help="rate of each rank's link; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="the same code in half a minute")
    arguments = parser.parse_args()
    for recompute in arguments.recompute:
        with (
            tempfile.TemporaryDirectory() as results,
            tempfile.TemporaryDirectory() as folder,
            limited_links(max(arguments.ranks), arguments.megabits) as hosts,
        ):
            wanted = plan(arguments, recompute, hosts, Path(results))
            write_model(Path(folder), "float32", wanted.model)
            for context in wanted.ranks:
                run_layout(ParallelConfig(context=context), Path(folder), wanted, run_rank)
            found = {n: json.loads((Path(results) / f"{n}.json").read_text()) for n in wanted.ranks}
        batch = work(wanted.setting, wanted.model["vocab_size"])
        line = {
            "benchmark": "context",
            "recompute": recompute,
            **{
                name: {n: n * values[index] / found[1][index] for n, values in found.items()}
                for index, name in enumerate(("work", "time", "memory"))
            },
            "overlap": {n: values[3] for n, values in found.items() if n > 1},
            "megabits": arguments.megabits,
            "cpu_seconds": found[1][0],
            "bytes": found[1][2],
            "tokens": batch.tokens("packed"),
            **asdict(wanted.setting),
            "model": wanted.model,
        }
        print(json.dumps(line), flush=True)  # noqa: T201 - the result


if __name__ == "__main__":
    main()
