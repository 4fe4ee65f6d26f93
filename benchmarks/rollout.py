"""Compares three ways to sample on one real engine on a CPU: trees, the same trees in lock-step, the same
leaves one by one.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout    # in the repository's root

The model is random and the response lengths are forced (rollout_comparison.py). Prints one JSON line for each
of SETTINGS, or of those that `--only` names. All of them take a quarter of an hour on an idle machine.

- `tree_over_sequential`, `tree_over_lockstep`: ratios of trajectories per second by the clock.
- `total_over_unique`: the most that `tree_over_sequential` could be.
- `..._cpu`: the same ratios by the CPU time of SGLang's process, which other work on the machine disturbs
  less.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from benchmarks.driver import text_of
from benchmarks.random_model import write_model
from benchmarks.rollout_comparison import Comparison
from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.config.sampling import SamplingConfig
from treepo.planning.simulation.lengths import LogNormal, random_prompts
from treepo.rollout.stopping import StopRule

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
KV_TOKENS = 12288


@dataclass(frozen=True, slots=True)
class Setting:
    """The workload of a comparison. mean: of the response lengths, in segments. sigma: of their logarithm."""

    mean: float
    initial_branching: int
    sigma: float = 0.5
    prompts: int = 12
    sequential: bool = True

    @property
    def lengths(self) -> LogNormal:
        return LogNormal(self.mean * SEGMENT_TOKENS, self.sigma)


SETTINGS = {
    "mean3-initial2": Setting(mean=3, initial_branching=2),
    "mean3-initial8": Setting(mean=3, initial_branching=8),
    "mean4-initial2": Setting(mean=4, initial_branching=2),
    "mean4-initial8": Setting(mean=4, initial_branching=8),
    # Lock-step waits longest here. One by one would show nothing new.
    "long-tails": Setting(mean=3, initial_branching=2, sigma=1.0, sequential=False),
    "many-prompts": Setting(mean=3, initial_branching=2, prompts=32),
}


def sampling(initial_branching: int) -> SamplingConfig:
    return SamplingConfig(
        segment_tokens=SEGMENT_TOKENS,
        max_depth=MAX_DEPTH,
        width=16,
        initial_branching=initial_branching,
        max_response_tokens=SEGMENT_TOKENS * MAX_DEPTH,
    )


async def compare(engine: SGLangEngine, names: Sequence[str], repeats: int) -> None:
    for name in names:
        setting = SETTINGS[name]
        drawn = random_prompts(setting.prompts, PROMPT_TOKENS, MODEL["vocab_size"])
        comparison = Comparison(
            engine, drawn, sampling(setting.initial_branching), setting.lengths, setting.sequential
        )
        line = {
            "benchmark": "rollout",
            "setting": name,
            **await comparison.run(repeats),
            "model": MODEL,
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--kv-tokens", type=int, default=KV_TOKENS)
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
            asyncio.run(compare(engine, arguments.only, arguments.repeats))
        finally:
            engine.close()


if __name__ == "__main__":
    main()
