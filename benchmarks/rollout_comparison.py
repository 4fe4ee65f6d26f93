"""Three ways to sample the same leaves on one engine: a tree, a tree in lock-step, one response at a time.

Lengths are forced, because a random model never ends: a path that has reached `a` response tokens ends at a
length drawn from a log-normal given that it is longer than `a`, by the seed of its request. So every path
ends as a sample of the policy would, whatever came above it, and the lock-step run grows the very same trees.
The sequential run decodes responses of exactly the tree's leaves' lengths, one request each: the ratio of
the two times has `total_over_unique` tokens as its ceiling.
"""

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sglang_rollout.driver import TreeDriver
from sglang_rollout.engine import SGLangEngine
from sglang_rollout.growing_tree import Ask, GrowingTree
from treepo import rng
from treepo.config.sampling import SamplingConfig
from treepo.data import Prompt
from treepo.protocols import Engine, GenerateOutput, GenerateRequest
from treepo.stopping import StopRule
from treepo.tree import Tree

_NORMAL = NormalDist()
_WARM_UP_PROMPTS = 4
Ends = Callable[[GenerateRequest], int]
"""Response tokens at which the path of a request ends."""


def write_model(folder: Path, dtype: str, shape: Mapping[str, Any]) -> None:
    """A random Qwen2 whose end token is one beyond its vocabulary: it cannot be sampled."""
    config = Qwen2Config(
        **shape,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=shape["vocab_size"],
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def prompts(count: int, tokens: int, vocabulary: int) -> list[Prompt]:
    """Random prompts that share no prefix worth caching."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, vocabulary, size=(count, tokens), dtype=np.int32)
    return [Prompt(str(index), row, "", "", "") for index, row in enumerate(drawn)]


def text_of(tokens: np.ndarray) -> str:
    """About as many characters as a word piece has; the stop rules read it."""
    return "".join(f" {token:x}" for token in tokens)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Response lengths in tokens: their mean, and the standard deviation of their logarithm."""

    mean: float
    sigma: float

    def draw(self, above: int, seed: int) -> int:
        """A length, given that it is more than `above`."""
        centre = math.log(self.mean) - self.sigma**2 / 2
        longer = _NORMAL.cdf((centre - math.log(above)) / self.sigma) if above else 1.0
        chance = rng.generator("length", seed).uniform(1e-12, 1 - 1e-12) * longer
        # Rounded up, so that a response is longer than `above` exactly where the log-normal is.
        return max(above + 1, math.ceil(math.exp(centre - self.sigma * _NORMAL.inv_cdf(chance))))


class DrawnEnds:
    """Ends drawn once for every seed: who asks on with the seed of an earlier request has that one's end."""

    def __init__(self, lengths: LogNormal) -> None:
        self._lengths = lengths
        self._ends: dict[int, int] = {}

    def __call__(self, request: GenerateRequest) -> int:
        if request.seed not in self._ends:
            above = len(request.context) - request.prompt_tokens
            self._ends[request.seed] = self._lengths.draw(above, request.seed)
        return self._ends[request.seed]


class ReplayedEnds:
    """The lengths of the trees' leaves, each given to one request for its prompt."""

    def __init__(self) -> None:
        self._ends: dict[bytes, Iterator[int]] = {}

    def replay(self, trees: Sequence[Tree]) -> None:
        for tree in trees:
            self._ends[tree.prompt.tobytes()] = iter([len(tree.response(leaf)) for leaf in tree.leaves])

    def __call__(self, request: GenerateRequest) -> int:
        return next(self._ends[request.context.tobytes()])


class ForcedLengths:
    """An engine whose paths end where `ends` says."""

    def __init__(self, engine: Engine, ends: Ends) -> None:
        self._engine = engine
        self._ends = ends
        self.decoded_tokens = 0
        self.prefilled_tokens = 0

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        left = self._ends(request) - (len(request.context) - request.prompt_tokens)
        output = await self._engine.generate(replace(request, max_tokens=min(request.max_tokens, left)))
        self.decoded_tokens += len(output.tokens)
        self.prefilled_tokens += len(request.context) - output.cached_tokens
        return replace(output, finish="eos") if len(output.tokens) == left else output


async def grow_in_lockstep(
    engine: Engine, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, step: int
) -> list[Tree]:
    """As the official code works: one segment for every active path of every prompt in one blocking batch,
    then the next batch.
    """
    rule = StopRule(sampling, text_of)
    trees = [GrowingTree(prompt, sampling, rule, seed, step) for prompt in prompts]
    seeds: dict[Ask, int] = {}

    async def grow(tree: GrowingTree, ask: Ask) -> None:
        request = tree.request(ask)
        one_segment = min(request.max_tokens, sampling.segment_tokens)
        seed = seeds.setdefault(ask, request.seed)
        output = await engine.generate(replace(request, max_tokens=one_segment, check_every=0, seed=seed))
        tree.receive(ask, output)

    while growing := [tree for tree in trees if tree.asks]:
        await asyncio.gather(
            *(grow(tree, ask) for tree in growing for ask in tree.asks if not ask.complete),
        )
        for tree in growing:
            if all(ask.complete for ask in tree.asks):
                tree.advance()
    return [tree.finished() for tree in trees]


@dataclass(frozen=True, slots=True)
class Measured:
    """One way's run. engine_cpu_seconds: of SGLang's process; driver_cpu_seconds: of this one."""

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

    Each driver serves all repeats, as it serves the steps of a training, after a first one that is not
    measured: it then knows how large its trees become.
    """

    def __init__(
        self, engine: SGLangEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, lengths: LogNormal
    ) -> None:
        self._engine, self._prompts, self._sampling, self._lengths = engine, prompts, sampling, lengths
        drawn, self._replayed = DrawnEnds(lengths), ReplayedEnds()
        self._tree_engine = ForcedLengths(engine, drawn)
        self._lockstep_engine = ForcedLengths(engine, drawn)
        self._sequential_engine = ForcedLengths(engine, self._replayed)
        kv_tokens = engine.capacity()
        self._tree = TreeDriver([self._tree_engine], sampling, text_of, seed=0, kv_tokens=kv_tokens)
        one_by_one = sampling.model_copy(update={"mode": "sequential"})
        self._sequential = TreeDriver(
            [self._sequential_engine], one_by_one, text_of, seed=0, kv_tokens=kv_tokens
        )

    async def run(self, repeats: int) -> dict[str, Any]:
        """Medians over repeats in which the ways alternate; every repeat grows other trees."""
        await self._repeat(0, self._prompts[:_WARM_UP_PROMPTS])
        self._tree.take_stats()
        runs = [await self._repeat(step, self._prompts) for step in range(1, repeats + 1)]
        ways = {name: [run[name] for run in runs] for name in runs[0]}
        stats = self._tree.take_stats()
        over_sequential = _ratio(ways, "sequential", lambda way: way.seconds)
        return {
            "tree_over_sequential": over_sequential,
            "tree_over_lockstep": _ratio(ways, "lockstep", lambda way: way.seconds),
            "total_over_unique": stats.total_over_unique,
            "share_of_ceiling": over_sequential / stats.total_over_unique,
            "cached_token_ratio": stats.cached_token_ratio,
            "tree_over_sequential_cpu": _ratio(ways, "sequential", lambda way: way.engine_cpu_seconds),
            "tree_over_lockstep_cpu": _ratio(ways, "lockstep", lambda way: way.engine_cpu_seconds),
            "response_tokens": stats.total_tokens / stats.leaves,
            **{name: _medians(measured) for name, measured in ways.items()},
            "lengths": asdict(self._lengths),
            "prompts": len(self._prompts),
            "prompt_tokens": len(self._prompts[0].tokens),
            **self._sampling.model_dump(
                include={"width", "initial_branching", "branching", "segment_tokens", "max_depth"}
            ),
            "kv_tokens": self._engine.capacity(),
            "repeats": repeats,
        }

    async def _repeat(self, step: int, prompts: Sequence[Prompt]) -> dict[str, Measured]:
        tree = await self._measure(self._tree_engine, _collect(self._tree, prompts, step))
        lockstep = await self._measure(
            self._lockstep_engine,
            grow_in_lockstep(self._lockstep_engine, prompts, self._sampling, seed=0, step=step),
        )
        assert _total(lockstep.trees) == _total(tree.trees), "not the same trees"
        self._replayed.replay(tree.trees)
        sequential = await self._measure(self._sequential_engine, _collect(self._sequential, prompts, step))
        assert sequential.decoded_tokens == _total(tree.trees), "not the same leaves"
        return {"tree": tree, "lockstep": lockstep, "sequential": sequential}

    async def _measure(self, engine: ForcedLengths, work: Awaitable[list[Tree]]) -> Measured:
        await self._engine.clear_cache()
        decoded, prefilled = engine.decoded_tokens, engine.prefilled_tokens
        start, cpu_start, engine_start = time.perf_counter(), time.process_time(), _children_cpu_seconds()
        trees = await work
        return Measured(
            trees=trees,
            seconds=time.perf_counter() - start,
            engine_cpu_seconds=_children_cpu_seconds() - engine_start,
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


def _children_cpu_seconds() -> float:
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def _ratio(ways: dict[str, list[Measured]], other: str, cost: Callable[[Measured], float]) -> float:
    """The other way's cost over the tree's, the median over repeats: trajectories are the same in both."""
    pairs = zip(ways["tree"], ways[other], strict=True)
    return statistics.median(cost(slow) / cost(tree) for tree, slow in pairs)


def _medians(runs: Sequence[Measured]) -> dict[str, float]:
    return {
        "trajectories_per_second": statistics.median(run.trajectories / run.seconds for run in runs),
        "seconds": statistics.median(run.seconds for run in runs),
        "engine_cpu_seconds": statistics.median(run.engine_cpu_seconds for run in runs),
        "driver_cpu_seconds": statistics.median(run.driver_cpu_seconds for run in runs),
        "decoded_tokens": statistics.median(run.decoded_tokens for run in runs),
        "prefilled_tokens": statistics.median(run.prefilled_tokens for run in runs),
    }
