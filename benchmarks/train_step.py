"""A train step of the real trainer on CPUs, packed trees against flat, at TP 1 and at TP 2 x PP 2.

    OMP_NUM_THREADS=1 python -m benchmarks.train_step

Run it in the repository's root. The script writes a random model. Every rank is a process of one thread,
and the ranks meet over gloo. Packed and flat steps alternate. Each layout, leaf length and initial branching
gives one JSON line:

packed_over_flat_time: ratio of clock seconds, the median over repeats.
packed_over_flat_cpu: ratio of the CPU seconds of all ranks, likewise. Other work on the machine disturbs it
    less, and it leaves out the time that a rank waits for another.
unique_over_total: tokens of the trees over those of their trajectories, prompts included. Compare the ratios
    with it.
packed_over_flat_tokens: the same, including the context that is repeated in trees longer than a micro-batch.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.full_tree import WIDTH
from benchmarks.packed_and_flat import Setting, work
from benchmarks.random_model import SHAPES, write_model
from treepo.config.learning import LearningConfig
from treepo.config.trainer import ParallelConfig, TrainerConfig

MODEL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LAYOUTS = (ParallelConfig(), ParallelConfig(tensor=2, pipeline=2))


@dataclass(frozen=True, slots=True)
class Plan:
    """The measurements of one run."""

    model: dict[str, int]
    settings: list[Setting]
    repeats: int


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one train step."""

    seconds: float
    cpu_seconds: float  # of all ranks


def plan(arguments: argparse.Namespace) -> Plan:
    if arguments.dry_run:
        return Plan(SHAPES["tiny"], [Setting(2, 8, 32, 8, 2, 256)], repeats=1)
    settings = [
        Setting(
            prompts=4,
            prompt_tokens=64,
            leaf_tokens=leaf_tokens,
            segment_tokens=64,
            initial_branching=initial_branching,
            max_tokens_per_pack=2048,
        )
        for leaf_tokens in arguments.leaf_tokens
        for initial_branching in arguments.initial_branching
    ]
    return Plan(MODEL, settings, arguments.repeats)


def cost(step: Callable[[], object]) -> Cost:
    """Time a step. Collective: all ranks begin together, and a step's optimizer waits for all of them."""
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    step()
    seconds = torch.tensor(time.process_time() - cpu_start, dtype=torch.float64)
    dist.all_reduce(seconds)
    return Cost(time.perf_counter() - start, float(seconds))


def run_rank(rank: int, layout: ParallelConfig, folder: Path, plan: Plan, ports: Any) -> None:
    """Measure every setting as one rank; rank 0 prints."""
    trainer = make_trainer(rank, layout, folder, ports)
    for setting in plan.settings:
        batch = work(setting, plan.model["vocab_size"])
        costs: dict[str, list[Cost]] = {way: [] for way in batch.packs}
        for _ in range(1 + plan.repeats):
            for way, packs in batch.packs.items():
                costs[way].append(cost(lambda: trainer.train_step(packs, 1.0, batch.denominator)))  # noqa: B023 - called at once
        if rank == 0:
            line = {
                "benchmark": "trainer",
                "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline},
                **_compared(costs["packed"][1:], costs["flat"][1:]),  # the first warmed up
                "unique_over_total": batch.unique_tokens / setting.total_tokens,
                "packed_over_flat_tokens": batch.tokens("packed") / batch.tokens("flat"),
                **{f"{way}_packs": len(packs) for way, packs in batch.packs.items()},
                "leaves": WIDTH,
                **asdict(setting),
                "repeats": plan.repeats,
                "model": plan.model,
            }
            print(json.dumps(line), flush=True)  # noqa: T201 - the result
    trainer.close()


def make_trainer(
    rank: int,
    layout: ParallelConfig,
    folder: Path,
    ports: Any,
    recompute: str = "none",
    host: str = "127.0.0.1",
) -> Any:
    """Join the other ranks, on one thread. ports: brings rank 0's, which is on `host`, to the others."""
    from megatron_bridge.trainer import MegatronTrainer, create_store, join_store

    torch.set_num_threads(1)
    if rank == 0:
        store = create_store(host)
        for _ in range(layout.ranks - 1):
            ports.put(store.port)
    else:
        store = join_store(host, ports.get())
    config = TrainerConfig.model_validate({"parallel": layout, "recompute": recompute})
    return MegatronTrainer(folder, "float32", config, LearningConfig(), rank, layout.ranks, store)


def _compared(packed: Sequence[Cost], flat: Sequence[Cost]) -> dict[str, float]:
    pairs = list(zip(packed, flat, strict=True))
    return {
        "packed_over_flat_time": statistics.median(a.seconds / b.seconds for a, b in pairs),
        "packed_over_flat_cpu": statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs),
        "packed_seconds": statistics.median(step.seconds for step in packed),
        "flat_seconds": statistics.median(step.seconds for step in flat),
    }


def run_layout(layout: ParallelConfig, folder: Path, plan: Any, run: Callable[..., None] = run_rank) -> None:
    """Start the ranks, which do `run`, and wait for them. If one fails, all are killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_bridge.trainer"])  # imported once
    ports = context.SimpleQueue()
    ranks = [
        context.Process(target=run, args=(rank, layout, folder, plan, ports)) for rank in range(layout.ranks)
    ]
    for process in ranks:
        process.start()
    try:
        _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _wait(ranks: Sequence[Any]) -> None:
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)  # type: ignore[arg-type]  # all are numbers
            if process.exitcode:
                raise SystemExit(f"a rank ended with exit code {process.exitcode}; its output is above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--leaf-tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--initial-branching", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="the same code in half a minute")
    wanted = plan(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), "float32", wanted.model)
        for layout in LAYOUTS:
            run_layout(layout, Path(folder), wanted)


if __name__ == "__main__":
    main()
