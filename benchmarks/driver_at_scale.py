"""What the paper's run asks of the driver, times 1 to 16, and where one driver process ends.

    OMP_NUM_THREADS=1 python -m benchmarks.driver_at_scale --cost
    OMP_NUM_THREADS=1 python -m benchmarks.driver_at_scale --simulated --request 150 --segment 25 --call 175

`--cost` runs the real driver, router and stop rules on a thousand engines that answer at once, with as many
trees at a time as the paper's run times 16 has, and prints CPU microseconds of a request and of a segment
(two workloads, two unknowns), and the memory of a tree.

`--simulated` grows a step's trees in virtual time on the simulated engines of `treepo plan`, with the driver
as a queue: every request, segment and call of Ray takes the CPU time that it was measured to take, one after
another. Requests that an engine gets at one time travel in one call, and so do answers that wait for the
driver. The step is compared with that of a driver that takes no time.

Prints one JSON line a run.
"""

import argparse
import asyncio
import gc
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks.driver import NullEngine, text_of
from treepo.config.load import load_config
from treepo.config.run import RunConfig
from treepo.planning.fit import fit
from treepo.planning.plan import model_folder
from treepo.planning.simulation.lengths import DrawnEnds, InstantEngine
from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import text_of as text_of_plan
from treepo.planning.simulation.workload import workload
from treepo.planning.speed.device_rates import planned_rates
from treepo.protocols import GenerateOutput, GenerateRequest, Sampler
from treepo.rollout.driver import TreeDriver
from treepo.rollout.garbage import rare_collections
from treepo.rollout.router import REMEMBERED_TREES, LiveTree
from treepo.tree import Tree

PAPER = Path("examples/paper/treepo-qwen2.5-7b.yaml")
LENGTHS = {  # of answers: the plan's mean, and all as long as is allowed
    "planned": ("plan.response_sigma=1.0",),
    "longest": ("plan.response_tokens=7168", "plan.response_sigma=0"),
}


async def trees_of(driver: TreeDriver, config: RunConfig, count: int, step: int) -> list[Tree]:
    prompts = workload(config).some_prompts(count)
    trees: list[Tree] = []
    async for tree in driver.sample(prompts, step):
        assert isinstance(tree, Tree), tree
        trees.append(tree)
    return trees


async def cpu_seconds(config: RunConfig, engines: int, trees: int) -> dict[str, float]:
    """Of growing the trees, all at a time, with the stop rules of training."""
    load, ends = workload(config), DrawnEnds(workload(config).lengths)
    samplers = [_Instant(config.sampling.max_response_tokens, ends) for _ in range(engines)]
    driver = TreeDriver(samplers, config.sampling, text_of, 0, kv_tokens=1 << 40)
    await trees_of(driver, config, trees, step=1)  # draws the lengths, and learns the texts of tokens
    driver.take_stats()
    segments = 0
    start, clock = time.process_time(), time.perf_counter()
    with rare_collections():
        async for tree in driver.sample(load.some_prompts(trees), step=1):
            assert isinstance(tree, Tree), tree
            segments += len(tree.segments)
    seconds, clock = time.process_time() - start, time.perf_counter() - clock
    return {
        "seconds": seconds,
        "by_the_clock": clock,
        "requests": driver.stats.requests,
        "segments": segments,
    }


def cost(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    measured = {}
    for name, overrides in LENGTHS.items():
        config = load_config(PAPER, list(overrides))
        trees = arguments.trees if name == "planned" else arguments.trees // 4  # they are longer
        measured[name] = asyncio.run(cpu_seconds(config, arguments.engines, trees))
    counts = np.array([[one["requests"], one["segments"]] for one in measured.values()])
    request, segment = np.linalg.solve(counts, [one["seconds"] for one in measured.values()])
    yield {
        "engines": arguments.engines,
        "trees": arguments.trees,
        "request_us": 1e6 * float(request),
        "segment_us": 1e6 * float(segment),
        **{f"{name}_{key}": value for name, one in measured.items() for key, value in one.items()},
    }
    for name, overrides in LENGTHS.items():
        config = load_config(PAPER, list(overrides))
        yield {"lengths": name, **asyncio.run(memory(config, trees=64))}


async def memory(config: RunConfig, trees: int) -> dict[str, float]:
    """Bytes of a tree when all paths of its last round are requested, and when it is finished."""
    load, null = workload(config), NullEngine(config.sampling.max_response_tokens)
    stopped = _StopsAtTheEnd(load.engine(null))
    driver = TreeDriver([stopped], config.sampling, text_of, 0)
    stopped.go_on.set()
    await trees_of(driver, config, trees, step=0)  # the stop rules know the tokens' texts now
    stopped.go_on.clear()
    prompts = load.some_prompts(trees)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    lives: list[LiveTree] = [driver.admit(prompt, 0) for prompt in prompts]
    growing = [asyncio.create_task(driver.grow(live)) for live in lives]
    while stopped.moving:
        stopped.moving = False
        await asyncio.sleep(0.01)
    gc.collect()
    growing_bytes = (tracemalloc.get_traced_memory()[0] - before) / trees
    stopped.go_on.set()
    finished = await asyncio.gather(*growing)
    lives.clear()
    growing.clear()
    gc.collect()
    finished_bytes = (tracemalloc.get_traced_memory()[0] - before) / trees
    tracemalloc.stop()
    tokens = sum(one.unique_tokens() for one in finished if isinstance(one, Tree)) / trees
    return {"growing_bytes": growing_bytes, "finished_bytes": finished_bytes, "tokens": tokens}


class _Instant(NullEngine):
    """Answers at once; paths end where `ends` says."""

    def __init__(self, longest: int, ends: DrawnEnds) -> None:
        super().__init__(longest)
        self._ends = ends

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        await asyncio.sleep(0)
        left = self._ends(request) - (len(request.context) - request.prompt_tokens)
        tokens = max(1, min(request.max_tokens, left))  # two requests may have the same seed
        return GenerateOutput(
            tokens=self._tokens[:tokens],
            log_probs=self._log_probs[:tokens],
            version=0,
            finish="eos" if left <= tokens else "length",
            cached_tokens=len(request.context) - 1,
        )


class _StopsAtTheEnd:
    """Answers a request for several segments only when told to."""

    def __init__(self, engine: Sampler) -> None:
        self._engine = engine
        self.go_on = asyncio.Event()
        self.moving = True

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        self.moving = True
        if request.check_every:
            await self.go_on.wait()
        return await self._engine.generate(request)


@dataclass(slots=True)
class BusyDriver:
    """The driver's process as a queue: one thing after another. Seconds of each."""

    request: float
    segment: float
    call: float
    busy: float = 0.0
    free_at: float = 0.0
    waits: list[float] = field(default_factory=list)
    requests: Counter[int] = field(default_factory=Counter)  # by second
    segments: int = 0
    calls: int = 0

    async def work(self, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        start = max(now, self.free_at)
        self.free_at = start + seconds
        self.busy += seconds
        self.waits.append(start - now)
        if self.free_at > now:
            await asyncio.sleep(self.free_at - now)


class FarEngine:
    """An engine beyond a busy driver. It counts as `RequestChannel` travels."""

    def __init__(self, engine: Sampler, driver: BusyDriver, segment_tokens: int) -> None:
        self._engine, self._driver, self._segment_tokens = engine, driver, segment_tokens
        self._posted = self._collected = -1.0  # when the last call leaves the driver, and reaches it

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        driver, clock = self._driver, asyncio.get_running_loop().time
        if self._posted < clock():
            driver.calls += 1
            self._posted = max(clock(), driver.free_at)
            await driver.work(driver.call)
        else:
            await asyncio.sleep(max(self._posted + driver.call - clock(), 0))
        output = await self._engine.generate(request)
        segments = -(-len(output.tokens) // self._segment_tokens)
        driver.requests[int(clock())] += 1
        driver.segments += segments
        seconds = driver.request + driver.segment * segments
        if self._collected < clock():
            driver.calls += 1
            seconds += driver.call
            self._collected = max(clock(), driver.free_at)
        await driver.work(seconds)
        return output


def step(config: RunConfig, scale: int, driver: BusyDriver) -> float:
    """Seconds of sampling one step on `scale` times the engines, with as many times the prompts."""
    folder = model_folder(config)
    engine = fit(config, folder).engine
    rates, load = planned_rates(config, folder, engine), workload(config)
    simulated = [
        SimulatedEngine(rates, engine.kv_tokens, engine.max_requests, engine.chunk_tokens)
        for _ in range(config.engine.count * scale)
    ]
    forced = [load.engine(InstantEngine()) for _ in simulated]
    real = TreeDriver(forced, load.sampling, text_of_plan, load.seed, engine.kv_tokens)

    async def work() -> float:
        await trees_of(real, config, REMEMBERED_TREES, step=0)
        for one, behind in zip(forced, simulated, strict=True):
            one.engine = FarEngine(behind, driver, config.sampling.segment_tokens)
        loop, prompts = asyncio.get_running_loop(), load.some_prompts(load.prompts * scale)
        start = loop.time()
        async for tree in real.sample(prompts, step=1):
            assert isinstance(tree, Tree), tree
        return loop.time() - start

    with rare_collections():
        return run_virtually(work())


def simulated(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    costs = [cost / 1e6 for cost in (arguments.request, arguments.segment, arguments.call)]
    for lengths in arguments.lengths:
        config = load_config(PAPER, list(LENGTHS[lengths]))
        at_once = step(config, 1, BusyDriver(0, 0, 0))
        for scale in arguments.scales:
            driver = BusyDriver(*costs)
            seconds = step(config, scale, driver)
            requests = sum(driver.requests.values())
            yield {
                "lengths": lengths,
                "scale": scale,
                "engines": config.engine.count * scale,
                "prompts": config.data.prompts_per_step * scale,
                "requests_per_s": requests / seconds,
                "segments_per_s": driver.segments / seconds,
                "calls_per_s": driver.calls / seconds,
                "busiest_second_requests": max(driver.requests.values()),
                "driver_busy": driver.busy / seconds,
                "wait_mean": float(np.mean(driver.waits)),
                "wait_p99": float(np.percentile(driver.waits, 99)),
                "seconds": seconds,
                "over_a_driver_without_cost": seconds / at_once,
                "request_us": arguments.request,
                "segment_us": arguments.segment,
                "call_us": arguments.call,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cost", action="store_true")
    which.add_argument("--simulated", action="store_true")
    parser.add_argument("--engines", type=int, default=1024)
    parser.add_argument("--trees", type=int, default=8192)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 4, 16])
    for name in ("request", "segment", "call"):
        parser.add_argument(f"--{name}", type=float, default=0.0, help="microseconds of the driver's CPU")
    arguments = parser.parse_args()
    for line in (cost if arguments.cost else simulated)(arguments):
        sys.stdout.buffer.write(
            orjson.dumps({"benchmark": "driver_at_scale", **line}, option=orjson.OPT_APPEND_NEWLINE)
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
