"""Measures the tree driver's own cost: segments per second on an engine that answers at once.

    python -m benchmarks.driver

Contexts have 7000 tokens and more, segments 512. Settings:

- `grown`: the paper's trees, 16 leaves of 14 segments, most of them requested in one go.
- `single`: each segment is a request of its own with its context. With a thousand and with ten thousand
  trees, the cost of a segment must be the same.

Prints one JSON line a run, with medians over interleaved repeats. `..._core_s` is per second of CPU time,
which other processes on the machine disturb less. Needs one core and nothing else.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np
import orjson

from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree

SETTINGS = {
    "grown": SamplingConfig(max_live_trees=64),
    "single": SamplingConfig(max_depth=1, initial_branching=16, max_live_trees=64),
}
RUNS = (("grown", 100), ("single", 1000), ("single", 10_000))
PROMPT_TOKENS = 7000


class NullEngine:
    """Answers after one turn of the event loop, with tokens that were drawn beforehand."""

    def __init__(self, longest: int) -> None:
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(2, 150_000, size=longest, dtype=np.int32)
        self._log_probs = -rng.random(longest, dtype=np.float32)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        await asyncio.sleep(0)
        return GenerateOutput(
            tokens=self._tokens[: request.max_tokens],
            log_probs=self._log_probs[: request.max_tokens],
            version=0,
            finish="length",
            cached_tokens=len(request.context) - 1,
        )


def text_of(tokens: np.ndarray) -> str:
    """Text of about as many characters as word pieces have, with as many backslashes as mathematics has; the
    stop rules read it.
    """
    return "".join(f" {token:x}" if token % 16 else f"\\{token:x}" for token in tokens)


def prompts(count: int) -> Iterator[Prompt]:
    tokens = np.arange(PROMPT_TOKENS, dtype=np.int32)
    return (Prompt(str(index), tokens, "", "", "") for index in range(count))


async def segments_per_second(sampling: SamplingConfig, trees: int) -> dict[str, float]:
    driver = TreeDriver([NullEngine(sampling.max_response_tokens)], sampling, text_of, seed=0)
    segments = 0
    start, cpu_start = time.perf_counter(), time.process_time()
    async for tree in driver.sample(prompts(trees), step=0):
        assert isinstance(tree, Tree)
        segments += len(tree.segments)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "segments_per_core_s": segments / cpu_seconds,
        "requests_per_core_s": driver.stats.requests / cpu_seconds,
        "segments_per_s": segments / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    results_of: dict[tuple[str, int], list[dict[str, float]]] = {run: [] for run in RUNS}
    for _ in range(arguments.repeats):
        for name, trees in RUNS:
            result = asyncio.run(segments_per_second(SETTINGS[name], trees))
            results_of[name, trees].append(result)
    for (name, trees), results in results_of.items():
        medians = {key: round(statistics.median(result[key] for result in results)) for key in results[0]}
        line = {
            "benchmark": "driver",
            "setting": name,
            "trees": trees,
            "prompt_tokens": PROMPT_TOKENS,
            "repeats": len(results),
        }
        sys.stdout.buffer.write(orjson.dumps({**line, **medians}, option=orjson.OPT_APPEND_NEWLINE))


if __name__ == "__main__":
    main()
