"""What sampling policies share of long answers, simulated.

    python -m benchmarks.sharing

The real driver grows trees of 16 answers on a simulated engine: Qwen2.5-7B on one H100 at the rates of
`treepo plan`. Lengths of answers are log-normal, cut off at four times their mean and at LONGEST. Every
answer is right or wrong by the toss of a coin, for the policies that read rewards; grading takes no time.

Prints one JSON line for each mean length and policy. `sharing`: tokens of all answers over tokens of the
tree, a shared one once. `answer_tokens`: mean length of an answer; trees prefer long ones, so compare tokens
rather than answers. `answers_per_second`: of the engine. `gpu_hours`: to sample answers of 10 million tokens
together. `over_sequential`: answers' tokens per second over those of independent samples. Needs one core for
a few minutes.
"""

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np
import orjson

from treepo.config.load import load_config
from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.planning.fit import fit
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.plan import model_folder
from treepo.planning.simulation.lengths import InstantEngine
from treepo.planning.simulation.rates import Rates
from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import text_of, workload
from treepo.planning.speed.device_rates import planned_rates
from treepo.rewards.grade import Grade
from treepo.rollout.driver import TreeDriver
from treepo.rollout.stats import Stats
from treepo.tree import Tree
from treepo.verdict import Verdict

CONFIG = Path("examples/paper/treepo-qwen2.5-7b.yaml")
LENGTHS = (1000, 2000, 4000, 7000, 16_000)
LONGEST = 31_000  # tokens of an answer; the packs of CONFIG hold no more
SEGMENT_TOKENS = 512
POLICIES: Mapping[str, Sequence[str]] = {
    "sequential": ("sampling.mode=sequential",),
    "paper": (),
    "more init": ("sampling.initial_branching=8",),
    "pivots": (
        "sampling.initial_branching=4",
        "sampling.branching=1",
        "sampling.fallback.order=wrong",
        "sampling.fallback.cut=pivot",
    ),
    # Paths branch from half of the mean answer on.
    "late": ("sampling.branch.from_depth={half}",),
    # The doublings to 16 paths are spread over the mean answer.
    "long segments": ("sampling.segment_tokens={quarter}", "sampling.fallback.window_tokens=null"),
}
"""Overrides of CONFIG. half: of the mean answer, in segments. quarter: in tokens, at least a segment."""


def sample(config: RunConfig, rates: Rates, engine: EngineMemory, prompts: int) -> tuple[float, Stats]:
    """Grow the trees of a step on one engine; seconds, and what the driver counted."""
    work = workload(config)
    forced = work.engine(SimulatedEngine(rates, engine.kv_tokens, engine.max_requests, engine.chunk_tokens))
    policies = {"width": config.sampling.width, "fallback": config.sampling.fallback}
    sampling: SamplingConfig = work.sampling.model_copy(update=policies)
    driver = TreeDriver([forced], sampling, text_of, work.seed, engine.kv_tokens, _toss)

    async def grow(step: int) -> None:
        async with aclosing(driver.sample(work.some_prompts(prompts), step)) as trees:
            async for tree in trees:
                assert isinstance(tree, Tree), tree

    async def run() -> tuple[float, Stats]:
        real, forced.engine = forced.engine, InstantEngine()
        await grow(0)  # the driver learns how large trees become
        forced.engine = real
        driver.take_stats()
        start = asyncio.get_running_loop().time()
        await grow(1)
        return asyncio.get_running_loop().time() - start, driver.take_stats()

    return run_virtually(run())


async def _toss(_prompt: Prompt, response: np.ndarray) -> Grade:
    right = int(response.sum()) % 2
    return Grade(float(right), Verdict.CORRECT if right else Verdict.WRONG)


def measure(policy: str, mean: int, prompts: int) -> dict[str, float | int | str]:
    longest = min(4 * mean, LONGEST)
    depth = -(-longest // SEGMENT_TOKENS)
    half, quarter = max(1, mean // (2 * SEGMENT_TOKENS)), max(SEGMENT_TOKENS, mean // 4)
    config = load_config(
        CONFIG,
        [
            f"sampling.max_depth={depth}",
            f"sampling.max_response_tokens={longest}",
            f"plan.response_tokens={mean}",
            *(override.format(half=half, quarter=quarter) for override in POLICIES[policy]),
        ],
    )
    folder = model_folder(config)
    engine = fit(config, folder).engine
    seconds, stats = sample(config, planned_rates(config, folder, engine), engine, prompts)
    return {
        "mean_tokens": mean,
        "policy": policy,
        "sharing": round(stats.total_over_unique, 2),
        "answer_tokens": round(stats.total_tokens / stats.leaves),
        "answers_per_second": round(stats.leaves / seconds, 3),
        "gpu_hours": round(1e7 * seconds / stats.total_tokens / 3600, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128, help="trees of a step, on one engine")
    parser.add_argument("--only", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    options = parser.parse_args()
    for mean in options.lengths:
        alone = measure("sequential", mean, options.prompts)
        for policy in options.only:
            line = alone if policy == "sequential" else measure(policy, mean, options.prompts)
            line |= {"over_sequential": round(float(alone["gpu_hours"]) / float(line["gpu_hours"]), 2)}
            sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
