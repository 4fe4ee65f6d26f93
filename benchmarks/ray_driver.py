"""Measures the tree driver through Ray: segments per second of a real actor whose engine answers at once.

    OMP_NUM_THREADS=1 python -m benchmarks.ray_driver

Two ways to ask the actor: `together`, as a run does (treepo/cluster/request_channel.py), and `one_by_one`, a
call of Ray for each request. They alternate. Every segment is a request of its own with its whole context.
Prints one JSON line for each length of the prompt, with medians over repeats; `cpu_microseconds` are those of
all processes, Ray's own included, for a segment.

`--apart` instead: a few actors, each with one request at a time, so that none travel together, as with a
thousand engines; then each with eight. `thread_microseconds` are those of the driver's Python thread for a
request with its answer: two calls of Ray, if it travels alone.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import psutil
import ray

from benchmarks.driver import NullEngine, text_of
from treepo.cluster.ray_engine import RayEngine
from treepo.cluster.request_channel import Answers, Posted, RequestDesk
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest, Sampler
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree

SAMPLING = SamplingConfig(max_depth=1, initial_branching=16, max_live_trees=64)


class HostedNullEngine(NullEngine):
    """The engine in its actor."""

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self._desk = RequestDesk(self.generate)

    async def post(self, requests: Posted, cancelled: Sequence[int]) -> None:
        self._desk.post(requests, cancelled)

    async def collect(self) -> Answers:
        return await self._desk.collect()


class OneByOne:
    """A call of Ray for each request."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        return await self._actor.generate.remote(request)


async def measure(engine: Sampler, prompt_tokens: int, trees: int) -> dict[str, float]:
    """Sample the trees, 64 of 16 leaves at a time."""
    driver = TreeDriver([engine], SAMPLING, text_of, seed=0)
    tokens = np.arange(prompt_tokens, dtype=np.int32)
    segments = 0
    cpu_start, start = _cpu_seconds(), time.perf_counter()
    async for tree in driver.sample([Prompt(str(n), tokens, "", "", "") for n in range(trees)], step=0):
        assert isinstance(tree, Tree), tree
        segments += len(tree.segments)
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - cpu_start
    return {"segments_per_second": segments / seconds, "cpu_microseconds": 1e6 * cpu_seconds / segments}


def _cpu_seconds() -> float:
    """Of this process and of all that it started."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))


async def compare(actor: Any, prompt_tokens: int, trees: int, repeats: int) -> dict[str, Any]:
    engines: dict[str, Sampler] = {"together": RayEngine("engine", actor, 1), "one_by_one": OneByOne(actor)}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in engines}
    for repeat in range(repeats + 1):
        for way, engine in engines.items():
            result = await measure(engine, prompt_tokens, trees)
            if repeat:  # the first warmed up
                runs[way].append(result)
    pairs = zip(runs["together"], runs["one_by_one"], strict=True)
    return {
        "benchmark": "ray_driver",
        "prompt_tokens": prompt_tokens,
        "cpu_of_one_by_one_over_together": statistics.median(
            other["cpu_microseconds"] / mine["cpu_microseconds"] for mine, other in pairs
        ),
        **{
            way: {key: round(statistics.median(run[key] for run in of_way)) for key in of_way[0]}
            for way, of_way in runs.items()
        },
        "trees": trees,
        "leaves": SAMPLING.width,
        "repeats": repeats,
    }


async def apart(actors: list[Any], prompt_tokens: int, at_once: int, requests: int) -> dict[str, Any]:
    """at_once: requests that each actor has at a time. Answers that are ready together share a call."""
    engines = [RayEngine(f"engine {index}", actor, 1) for index, actor in enumerate(actors)]
    context = np.arange(prompt_tokens, dtype=np.int32)
    request = GenerateRequest(context, prompt_tokens, SAMPLING.segment_tokens, 1.0, seed=1)

    async def one(engine: RayEngine, count: int) -> None:
        for _ in range(count):
            await engine.generate(request)

    async def all_of(count: int) -> float:
        start = time.thread_time()
        await asyncio.gather(*(one(engine, count) for engine in engines for _ in range(at_once)))
        return time.thread_time() - start

    await all_of(20)  # warms up
    seconds = await all_of(requests)
    return {
        "benchmark": "ray_driver_apart",
        "prompt_tokens": prompt_tokens,
        "actors": len(actors),
        "requests_at_once": at_once,
        "thread_microseconds": 1e6 * seconds / (len(actors) * at_once * requests),
        "requests": requests,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1000, 8000])
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--apart", action="store_true")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        remote: Any = ray.remote(HostedNullEngine)
        options = remote.options(max_concurrency=100_000, num_cpus=0.1)
        if arguments.apart:
            actors = [options.remote(SAMPLING.max_response_tokens) for _ in range(4)]
            for at_once, requests in ((1, 400), (8, 100)):
                line = asyncio.run(apart(actors, arguments.prompt_tokens[0], at_once, requests))
                sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            return
        actor = options.remote(SAMPLING.max_response_tokens)
        for tokens in arguments.prompt_tokens:
            line = asyncio.run(compare(actor, tokens, arguments.trees, arguments.repeats))
            sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            sys.stdout.flush()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
