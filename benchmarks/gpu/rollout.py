"""Compares three ways to sample on one GPU: trees, the same trees in lock-step, the same leaves one by one.

    python -m benchmarks.gpu.rollout --shapes 0.5b --widths 16 --seconds 300    # in the repository's root

Prints one JSON line a shape and width as soon as it is measured; the keys are those of benchmarks/rollout.py.
`--seconds` bounds the time: no repeat begins that would probably end later, and what is left is skipped. The
first repeat of the first shape and width always runs. `--dry-run` runs the same code with a tiny shape on a
CPU, in a minute.

The models are random Qwen2.5 shapes that this script writes. Response lengths are forced
(treepo/planning/simulation/lengths.py): log-normal, on average 3.5 of 14 segments of 512 tokens. Attention is
SGLang's Triton backend, which needs no flash-attention kernels.

Needs one GPU with room for the larger shape (7B in bfloat16: 15 GB of weights, the rest is KV cache), Python
3.12, torch 2.11.0 for CUDA 13, and SGLang. On a machine without network, SGLang can be installed from wheels:

    pip download -d wheels -c constraints.txt sglang==0.5.16    # on a machine with network
    pip install --no-index --find-links wheels sglang==0.5.16

The first command fetches every wheel that SGLang depends on, torch, transformers, numpy, orjson, psutil,
pydantic and PyYAML among them. This repository needs nothing else to sample, and runs from its sources.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from benchmarks.driver import text_of
from benchmarks.random_model import SHAPES, write_model
from benchmarks.rollout_comparison import Comparison
from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.config.sampling import SamplingConfig
from treepo.planning.simulation.lengths import LogNormal, random_prompts
from treepo.rollout.stopping import StopRule

MEAN_SEGMENTS, SIGMA = 3.5, 0.5


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes in which a real run and a dry run differ."""

    shapes: list[str]
    widths: list[int]
    prompts: int
    prompt_tokens: int
    segment_tokens: int
    max_depth: int
    dtype: str
    engine: EngineConfig

    def sampling(self, width: int) -> SamplingConfig:
        return SamplingConfig(
            segment_tokens=self.segment_tokens,
            max_depth=self.max_depth,
            width=width,
            max_response_tokens=self.segment_tokens * self.max_depth,
        )


def dry_scale() -> Scale:
    return Scale(
        shapes=["tiny"],
        widths=[4],
        prompts=6,
        prompt_tokens=16,
        segment_tokens=8,
        max_depth=6,
        dtype="float32",
        engine=EngineConfig(max_total_tokens=4096),
    )


def scale(arguments: argparse.Namespace) -> Scale:
    if arguments.dry_run:
        return dry_scale()
    return Scale(
        shapes=arguments.shapes,
        widths=arguments.widths,
        prompts=arguments.prompts,
        prompt_tokens=256,
        segment_tokens=512,
        max_depth=14,
        dtype="bfloat16",
        engine=EngineConfig(attention_backend="triton"),
    )


@dataclass(frozen=True, slots=True)
class Budget:
    """repeats: of each shape and width. deadline: `time.perf_counter()`, None for no limit."""

    repeats: int
    deadline: float | None

    @property
    def spent(self) -> bool:
        return self.deadline is not None and time.perf_counter() >= self.deadline


def measure(shape: str, scale: Scale, budget: Budget) -> None:
    """Start one engine on a random model of this shape and compare the ways on it, width by width."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), scale.dtype, SHAPES[shape])
        rule = StopRule(scale.sampling(scale.widths[0]), text_of)
        engine = SGLangEngine(Path(folder), scale.dtype, scale.engine, seed=0, stop_rule=rule)
        try:
            asyncio.run(_compare(engine, shape, scale, budget))
        finally:
            engine.close()


async def _compare(engine: SGLangEngine, shape: str, scale: Scale, budget: Budget) -> None:
    for number, width in enumerate(scale.widths):
        if number and budget.spent:
            return
        line = await compare(engine, shape, scale, width, budget)
        sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.flush()


async def compare(
    engine: SGLangEngine, shape: str, scale: Scale, width: int, budget: Budget
) -> dict[str, Any]:
    """The line of one shape and width, on an engine that serves a model of this shape."""
    drawn = random_prompts(scale.prompts, scale.prompt_tokens, SHAPES[shape]["vocab_size"])
    lengths = LogNormal(MEAN_SEGMENTS * scale.segment_tokens, SIGMA)
    comparison = Comparison(engine, drawn, scale.sampling(width), lengths)
    return {
        "benchmark": "gpu/rollout",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "shape": shape,
        **await comparison.run(budget.repeats, budget.deadline),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["0.5b", "7b"], default=["0.5b", "7b"])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--prompts", type=int, default=64, help="prompts of each repeat")
    parser.add_argument("--repeats", type=int, default=3, help="most repeats of each shape and width")
    parser.add_argument("--seconds", type=float, help="time budget; no limit by default")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --dry-run runs on a CPU")
    seconds = arguments.seconds
    budget = Budget(arguments.repeats, None if seconds is None else time.perf_counter() + seconds)
    wanted = scale(arguments)
    for number, shape in enumerate(wanted.shapes):
        if number == 0 or not budget.spent:
            measure(shape, wanted, budget)


if __name__ == "__main__":
    main()
