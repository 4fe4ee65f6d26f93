"""Times three ways to sample the same leaves on one engine: trees, the same trees in lock-step, one response
at a time.

Response lengths are forced, because a random model never ends (treepo/planning/simulation/lengths.py). The
lock-step run grows the same trees. The sequential run decodes responses of exactly the lengths of the trees'
leaves, one request each, so `total_over_unique` bounds the ratio of the two times.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.driver import text_of
from benchmarks.engine_calibration import engine_cpu_seconds
from sglang_rollout.engine import SGLangEngine
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.planning.simulation.lengths import (
    DrawnEnds,
    ForcedLengths,
    InstantEngine,
    LogNormal,
    random_prompts,
)
from treepo.protocols import GenerateRequest, Sampler
from treepo.rollout.driver import TreeDriver
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.path import PathRequest
from treepo.rollout.router import REMEMBERED_TREES
from treepo.rollout.stopping import StopRule
from treepo.tree import Tree


class ReplayedEnds:
    """Response lengths of trees' leaves; each request for a prompt gets the length of one leaf."""

    def __init__(self) -> None:
        self._ends: dict[bytes, Iterator[int]] = {}

    def replay(self, trees: Sequence[Tree]) -> None:
        for tree in trees:
            self._ends[tree.prompt.tobytes()] = iter([len(tree.response(leaf)) for leaf in tree.leaves])

    def __call__(self, request: GenerateRequest) -> int:
        return next(self._ends[request.context.tobytes()])


async def grow_in_lockstep(
    engine: Sampler, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, step: int
) -> list[Tree]:
    """Sample as the official code does: one segment for every active path of every prompt in one blocking
    batch, then the next batch.
    """
    rule = StopRule(sampling, text_of)
    trees = [GrowingTree(prompt, sampling, rule, seed, step) for prompt in prompts]
    seeds: dict[PathRequest, int] = {}

    async def grow(tree: GrowingTree, path: PathRequest) -> None:
        request = tree.generate_request(path)
        one_segment = min(request.max_tokens, sampling.segment_tokens)
        seed = seeds.setdefault(path, request.seed)
        output = await engine.generate(replace(request, max_tokens=one_segment, check_every=0, seed=seed))
        tree.receive(path, output)

    while growing := [tree for tree in trees if tree.path_requests]:
        await asyncio.gather(
            *(grow(tree, path) for tree in growing for path in tree.path_requests if not path.complete),
        )
        for tree in growing:
            if all(path.complete for path in tree.path_requests):
                tree.advance()
    return [tree.finished() for tree in trees]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one way. engine_cpu_seconds: of SGLang's processes. driver_cpu_seconds: of this process."""

    trees: list[Tree]
    seconds: float
    engine_cpu_seconds: float
    driver_cpu_seconds: float
    decoded_tokens: int
    prefilled_tokens: int

    @property
    def trajectories(self) -> int:
        return sum(len(tree.leaves) for tree in self.trees)


class Comparison:
    """The three ways on one engine with the same prompts and the same sampling.

    Each driver serves all repeats, as it serves all steps of a training. Before that it has grown trees on an
    engine that answers at once, so it knows how large they become. sequential: whether leaves are also
    sampled one by one.
    """

    def __init__(
        self,
        engine: SGLangEngine,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        lengths: LogNormal,
        sequential: bool = True,
    ) -> None:
        self._engine, self._prompts, self._sampling, self._lengths = engine, prompts, sampling, lengths
        drawn, self._replayed = DrawnEnds(lengths), ReplayedEnds()
        self._tree_engine = ForcedLengths(engine, drawn)
        self._lockstep_engine = ForcedLengths(engine, drawn)
        self._sequential_engine = ForcedLengths(engine, self._replayed)
        kv_tokens = engine.capacity()
        self._tree = TreeDriver([self._tree_engine], sampling, text_of, seed=0, kv_tokens=kv_tokens)
        one_by_one = sampling.model_copy(update={"mode": "sequential"})
        self._sequential = (
            TreeDriver([self._sequential_engine], one_by_one, text_of, seed=0, kv_tokens=kv_tokens)
            if sequential
            else None
        )

    async def run(self, repeats: int, deadline: float | None = None) -> dict[str, Any]:
        """Medians over repeats in which the ways alternate; every repeat grows other trees.

        deadline: `time.perf_counter()` after which no repeat but the first may be expected to end, judging by
        the longest so far.
        """
        await self._warm_up()
        runs: list[dict[str, Measured]] = []
        longest = 0.0
        while len(runs) < repeats:
            start = time.perf_counter()
            if runs and deadline is not None and start + longest > deadline:
                break
            runs.append(await self._repeat(len(runs) + 1, self._prompts))
            longest = max(longest, time.perf_counter() - start)
        ways = {name: [run[name] for run in runs] for name in runs[0]}
        stats = self._tree.take_stats()
        return {
            **_ratios(ways),
            "total_over_unique": stats.total_over_unique,
            "cached_token_ratio": stats.cached_token_ratio,
            "response_tokens": stats.total_tokens / stats.leaves,
            **{name: _medians(measured) for name, measured in ways.items()},
            "lengths": asdict(self._lengths),
            "prompts": len(self._prompts),
            "prompt_tokens": len(self._prompts[0].tokens),
            **self._sampling.model_dump(
                include={"width", "initial_branching", "branching", "segment_tokens", "max_depth"}
            ),
            "kv_tokens": self._engine.capacity(),
            "repeats": len(runs),
        }

    async def _warm_up(self) -> None:
        """Let the drivers learn how large trees become, and sample one prompt on the real engine."""
        forced, real = self._tree_engine, self._engine
        forced.engine = InstantEngine()
        trees = await _collect(self._tree, self._warm_up_prompts(), step=0)
        forced.engine = real
        if self._sequential is not None:
            self._replayed.replay(trees)
            self._sequential_engine.engine = InstantEngine()
            await _collect(self._sequential, self._warm_up_prompts(), step=0)
            self._sequential_engine.engine = real
        await self._repeat(0, self._prompts[:1])
        self._tree.take_stats()

    def _warm_up_prompts(self) -> list[Prompt]:
        return random_prompts(REMEMBERED_TREES, len(self._prompts[0].tokens), 2**16)

    async def _repeat(self, step: int, prompts: Sequence[Prompt]) -> dict[str, Measured]:
        tree = await self._measure(self._tree_engine, _collect(self._tree, prompts, step))
        lockstep = await self._measure(
            self._lockstep_engine,
            grow_in_lockstep(self._lockstep_engine, prompts, self._sampling, seed=0, step=step),
        )
        assert _total(lockstep.trees) == _total(tree.trees), "not the same trees"
        if self._sequential is None:
            return {"tree": tree, "lockstep": lockstep}
        self._replayed.replay(tree.trees)
        sequential = await self._measure(self._sequential_engine, _collect(self._sequential, prompts, step))
        assert sequential.decoded_tokens == _total(tree.trees), "not the same leaves"
        return {"tree": tree, "lockstep": lockstep, "sequential": sequential}

    async def _measure(self, engine: ForcedLengths, work: Awaitable[list[Tree]]) -> Measured:
        await self._engine.clear_cache()
        decoded, prefilled = engine.decoded_tokens, engine.prefilled_tokens
        start, cpu_start, engine_start = time.perf_counter(), time.process_time(), engine_cpu_seconds()
        trees = await work
        return Measured(
            trees=trees,
            seconds=time.perf_counter() - start,
            engine_cpu_seconds=engine_cpu_seconds() - engine_start,
            driver_cpu_seconds=time.process_time() - cpu_start,
            decoded_tokens=engine.decoded_tokens - decoded,
            prefilled_tokens=engine.prefilled_tokens - prefilled,
        )


async def _collect(driver: TreeDriver, prompts: Sequence[Prompt], step: int) -> list[Tree]:
    trees: list[Tree] = []
    async for tree in driver.sample(prompts, step):
        assert isinstance(tree, Tree), tree
        trees.append(tree)
    return trees


def _total(trees: Sequence[Tree]) -> int:
    return sum(tree.total_tokens() for tree in trees)


def _ratios(ways: Mapping[str, Sequence[Measured]]) -> dict[str, float]:
    """Trajectories per second of trees over each other way's, by the clock and by SGLang's CPU time."""
    ratios: dict[str, float] = {}
    for other in sorted(ways.keys() - {"tree"}):
        ratios[f"tree_over_{other}"] = _ratio(ways["tree"], ways[other], lambda way: way.seconds)
        ratios[f"tree_over_{other}_cpu"] = _ratio(
            ways["tree"], ways[other], lambda way: way.engine_cpu_seconds
        )
    return ratios


def _ratio(trees: Sequence[Measured], others: Sequence[Measured], cost: Callable[[Measured], float]) -> float:
    """Median over repeats of the other way's cost over the trees'; both sample the same trajectories."""
    return statistics.median(cost(other) / cost(tree) for tree, other in zip(trees, others, strict=True))


def _medians(runs: Sequence[Measured]) -> dict[str, float]:
    return {
        "trajectories_per_second": statistics.median(run.trajectories / run.seconds for run in runs),
        "seconds": statistics.median(run.seconds for run in runs),
        "engine_cpu_seconds": statistics.median(run.engine_cpu_seconds for run in runs),
        "driver_cpu_seconds": statistics.median(run.driver_cpu_seconds for run in runs),
        "decoded_tokens": statistics.median(run.decoded_tokens for run in runs),
        "prefilled_tokens": statistics.median(run.prefilled_tokens for run in runs),
    }
