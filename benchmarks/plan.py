"""Simulated sampling, as `treepo plan` does it, against the sampling of one real engine on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.plan    # in the repository's root

The script writes a random model and forces response lengths (treepo/planning/simulation/lengths.py). Each
repeat times the engine's passes (engine_calibration.py) and then samples on it with the real driver. Then the
same driver samples the same trees on a simulated engine at the fitted rates. One JSON line a setting: medians
over repeats of simulated over measured seconds, by the clock and by CPU time of SGLang's processes, and the
fitted rates. It does not test the GPU rates of treepo/planning/speed/device_rates.py.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.engine_calibration import Calibration, FittedRates, Timed, timed
from benchmarks.random_model import write_model
from benchmarks.rollout import MODEL
from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.config.sampling import SamplingConfig
from treepo.planning.simulation.lengths import (
    DrawnEnds,
    ForcedLengths,
    InstantEngine,
    LogNormal,
    random_prompts,
)
from treepo.planning.simulation.simulated_engine import Counts, SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.protocols import Sampler
from treepo.rollout.driver import TreeDriver
from treepo.rollout.router import REMEMBERED_TREES
from treepo.tree import Tree

PROMPT_TOKENS, SEGMENT_TOKENS, MAX_DEPTH = 64, 64, 6
_STOPS = {"boxed": "off", "repetition": {"check": "off"}}


@dataclass(frozen=True, slots=True)
class Setting:
    """kv_tokens: the cache that the driver fills."""

    mode: str = "tree"
    width: int = 16
    prompts: int = 6
    kv_tokens: int = 32768

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig.model_validate({
            "mode": self.mode,
            "segment_tokens": SEGMENT_TOKENS,
            "max_depth": MAX_DEPTH,
            "width": self.width,
            "max_response_tokens": SEGMENT_TOKENS * MAX_DEPTH,
            "stops": _STOPS,
        })  # fmt: skip


SETTINGS = {
    "trees": Setting(),
    "tight": Setting(prompts=8, kv_tokens=3072),
    "one-by-one": Setting(mode="sequential", width=8),
}
LENGTHS = LogNormal(2 * SEGMENT_TOKENS, 0.5)


class TreeSampler:
    """One driver on one engine, real or simulated, that has grown other trees before."""

    def __init__(self, setting: Setting, engine: Sampler) -> None:
        self._setting, self._engine = setting, engine
        self._forced = ForcedLengths(InstantEngine(), DrawnEnds(LENGTHS))
        self._driver = TreeDriver([self._forced], setting.sampling, lambda _: "", 0, setting.kv_tokens)

    async def warm_up(self) -> None:
        await self._grow(REMEMBERED_TREES, step=0)
        self._forced.engine = self._engine

    async def sample(self, step: int) -> list[Tree]:
        return await self._grow(self._setting.prompts, step)

    async def _grow(self, prompts: int, step: int) -> list[Tree]:
        trees: list[Tree] = []
        async for tree in self._driver.sample(random_prompts(prompts, PROMPT_TOKENS, 512), step):
            assert isinstance(tree, Tree), tree
            trees.append(tree)
        return trees


@dataclass(frozen=True, slots=True)
class Simulated:
    """seconds: virtual. tokens: of all trees, a shared token once."""

    seconds: float
    tokens: int
    counts: Counts


async def simulate(setting: Setting, rates: FittedRates, step: int) -> Simulated:
    """One sampling on a virtual clock."""
    engine = SimulatedEngine(rates, setting.kv_tokens)
    sampler = TreeSampler(setting, engine)
    await sampler.warm_up()
    loop = asyncio.get_running_loop()
    start = loop.time()
    trees = await sampler.sample(step)
    return Simulated(loop.time() - start, sum(tree.unique_tokens() for tree in trees), engine.counts)


async def measure(engine: SGLangEngine, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Alternates samplings and calibrations. Returns times and tokens of each repeat, by setting."""
    calibration = Calibration(engine, MODEL["vocab_size"])
    samplers = {name: TreeSampler(SETTINGS[name], engine) for name in names}
    for sampler in samplers.values():
        await sampler.warm_up()
    await calibration.round()
    calibration = Calibration(engine, MODEL["vocab_size"])  # the first passes are slower
    measured: dict[str, list[tuple[Timed, int]]] = {name: [] for name in names}
    for step in range(1, repeats + 1):
        for name, sampler in samplers.items():
            await calibration.round()
            trees: list[Tree] = []

            async def sample(
                sampler: TreeSampler = sampler, step: int = step, trees: list[Tree] = trees
            ) -> None:
                trees += await sampler.sample(step)

            times = await timed(sample())
            measured[name].append((times, sum(tree.unique_tokens() for tree in trees)))
            await engine.clear_cache()
    return {"calibration": calibration, "measured": measured}


def compare(
    setting: Setting, measured: Sequence[tuple[Timed, int]], calibration: Calibration
) -> dict[str, Any]:
    """One setting's JSON line."""
    by_clock, by_cpu = calibration.fit(cpu=False), calibration.fit(cpu=True)
    ratios, cpu_ratios, batches = [], [], []
    for step, (times, tokens) in enumerate(measured, start=1):
        simulated = run_virtually(simulate(setting, by_clock, step))
        assert simulated.tokens == tokens, "not the same trees"
        ratios.append(simulated.seconds / times.seconds)
        cpu_ratios.append(
            run_virtually(simulate(setting, by_cpu, step)).counts.busy_seconds / times.cpu_seconds
        )
        batches.append(simulated.counts.mean_batch)
    return {
        "simulated_over_measured": statistics.median(ratios),
        "simulated_over_measured_cpu": statistics.median(cpu_ratios),
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
        "seconds": statistics.median(times.seconds for times, _ in measured),
        "engine_cpu_seconds": statistics.median(times.cpu_seconds for times, _ in measured),
        "mean_batch": statistics.median(batches),
        "tokens": statistics.median(tokens for _, tokens in measured),
        "rates": asdict(by_clock),
        "cpu_rates": asdict(by_cpu),
        **asdict(setting),
        "repeats": len(measured),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), "float32", MODEL)
        config = EngineConfig(max_total_tokens=max(SETTINGS[name].kv_tokens for name in arguments.only))
        engine = SGLangEngine(Path(folder), "float32", config, seed=0, stop_rule=lambda _: False)
        try:
            results = asyncio.run(measure(engine, arguments.only, arguments.repeats))
        finally:
            engine.close()
    for name in arguments.only:
        line = {
            "benchmark": "plan",
            "setting": name,
            **compare(SETTINGS[name], results["measured"][name], results["calibration"]),
        }
        sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


if __name__ == "__main__":
    main()
