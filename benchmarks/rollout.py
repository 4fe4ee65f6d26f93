"""Sampling on one real engine on a CPU: trees, the same trees in lock-step, the same leaves one by one.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout

Run it in the repository's root. A random model that this script writes; forced response lengths, see
rollout_comparison.py. One JSON line for each mean length (in segments of 64 tokens) and initial branching.
`tree_over_sequential` and `tree_over_lockstep` are ratios of trajectories per second by the clock,
`total_over_unique` is what the first could be at most, `..._cpu` are the same ratios by the CPU time of
SGLang's process, which other work on the machine disturbs less.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import orjson

from benchmarks.random_model import write_model
from benchmarks.rollout_comparison import Comparison, LogNormal, prompts, text_of
from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.config.sampling import SamplingConfig
from treepo.stopping import StopRule

MODEL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
PROMPT_TOKENS, SEGMENT_TOKENS, MAX_DEPTH = 64, 64, 14


def sampling(initial_branching: int) -> SamplingConfig:
    return SamplingConfig(
        segment_tokens=SEGMENT_TOKENS,
        max_depth=MAX_DEPTH,
        width=16,
        initial_branching=initial_branching,
        max_response_tokens=SEGMENT_TOKENS * MAX_DEPTH,
    )


def settings(arguments: argparse.Namespace) -> Iterator[tuple[LogNormal, SamplingConfig]]:
    for segments in arguments.mean_segments:
        for initial_branching in arguments.initial_branching:
            yield LogNormal(segments * SEGMENT_TOKENS, arguments.sigma), sampling(initial_branching)


async def compare(engine: SGLangEngine, arguments: argparse.Namespace) -> None:
    drawn = prompts(arguments.prompts, PROMPT_TOKENS, MODEL["vocab_size"])
    for lengths, config in settings(arguments):
        record = await Comparison(engine, drawn, config, lengths).run(arguments.repeats)
        line = {
            "benchmark": "rollout",
            **record,
            "model": MODEL,
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mean-segments", type=float, nargs="+", default=[3.0, 4.0])
    parser.add_argument("--sigma", type=float, default=0.5, help="of the lengths' logarithm")
    parser.add_argument("--initial-branching", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--kv-tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), "float32", MODEL)
        engine = SGLangEngine(
            Path(folder),
            "float32",
            EngineConfig(max_total_tokens=arguments.kv_tokens),
            seed=0,
            stop_rule=StopRule(sampling(initial_branching=2), text_of),
        )
        try:
            asyncio.run(compare(engine, arguments))
        finally:
            engine.close()


if __name__ == "__main__":
    main()
