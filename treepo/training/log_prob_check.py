"""The log-prob check before the first step: trainer and engines must give the same tokens the same log-probs.

Every engine samples a few short trees as training does: same driver, temperature and cache, and the same
prompts in every run and on every engine. So an engine with wrong weights or a wrong temperature is found
here. Equal weights, temperature and vocabulary give equal log-probs up to rounding. Any other difference
makes every later step learn from wrong ratios, which looks like a bad hyper-parameter.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np

from treepo.config.learning import LearningConfig
from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.errors import EngineError, LogProbCheckError
from treepo.learning.advantage import estimate
from treepo.learning.packing import Pack, pack_trees
from treepo.protocols import Engine
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.tree import Tree, Verdict

SEGMENT_TOKENS = 64  # at most, so that a check takes seconds
SUSPECTS = (
    "the temperature (not the same on both sides), vocabulary padding (columns beyond the "
    "tokenizer's), fused kernels (engine.attention_backend), dtype (model.dtype on one side only), "
    "stale weights (the engine serves other weights than the trainer has)"
)
OF_MIXTURES = (
    "; of a mixture also routing (rounding makes one side choose other experts; trainer.routing_replay = "
    "rollout gives the trainer the engine's)"
)

_log = logging.getLogger(__name__)


class LogProbs(Protocol):
    """The part of `treepo.protocols.Trainer` that computes log-probs."""

    @property
    def dtype(self) -> str: ...

    async def log_probs(
        self, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]: ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences on the sampled tokens of one engine's trees; a shared token counts once.

    mean, largest: of |trainer - engine|, in nats. prompt_id, token: prompt of the worst token, and its place
    in its response, from 1. engine, trainer: the two log-probs of that token.
    """

    tokens: int
    mean: float
    largest: float
    prompt_id: str
    token: int
    engine: float
    trainer: float

    def within(self, mean_limit: float, max_limit: float) -> bool:
        """Whether both limits hold; false if a log-prob is not a number."""
        return self.mean <= mean_limit and self.largest <= max_limit


async def check_log_probs(
    config: RunConfig,
    prompts: Sequence[Prompt],
    decode: Callable[[np.ndarray], str],
    engines: Sequence[Engine],
    trainer: LogProbs,
    training: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
) -> dict[str, float]:
    """Return the largest `mean` and `max` of |trainer's log-prob - engine's| over the engines, and the number
    of `tokens` that were compared.

    training: gives the trainer the devices that it shares with the engines. Raises LogProbCheckError if an
    engine exceeds the limits of `config.log_prob_check`, and EngineError if it cannot sample.
    """
    sampling = short_sampling(config.sampling)
    fixed = prompts[: config.log_prob_check.prompts]

    def sampled(engine: Engine) -> Awaitable[list[Tree]]:
        driver = TreeDriver([engine], sampling, decode, config.seed, routes=config.samples_routes)
        return _sample(driver, fixed, engine)

    forests = await asyncio.gather(*map(sampled, engines))
    packed = [
        _pack_all(trees, config.trainer.max_tokens_per_pack, config.trainer.parallel.data)
        for trees in forests
    ]
    async with training():
        computed = [await trainer.log_probs(packs, sampling.temperature) for packs in packed]
    limits = config.log_prob_check.limits(trainer.dtype)
    figures = {"mean": 0.0, "max": 0.0, "tokens": 0}
    for engine, trees, packs, log_probs in zip(engines, forests, packed, computed, strict=True):
        comparison = _compare(trees, packs, log_probs)
        if not comparison.within(*limits):
            suspects = SUSPECTS + (OF_MIXTURES if config.trainer.routing_replay != "rollout" else "")
            raise LogProbCheckError(
                _disagreement(comparison, engine.name, sampling.temperature, *limits, suspects)
            )
        figures["mean"] = max(figures["mean"], comparison.mean)
        figures["max"] = max(figures["max"], comparison.largest)
        figures["tokens"] += comparison.tokens
    _log.info(
        "trainer and engines agree on %d sampled tokens: log-probs differ by %.2g on average (limit %g) "
        "and by up to %.2g (limit %g)",
        figures["tokens"],
        figures["mean"],
        limits[0],
        figures["max"],
        limits[1],
    )
    return figures


def short_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """Settings for two leaves below a shared segment, at the run's temperature and within its lengths."""
    longest = sampling.max_response_tokens
    segment_tokens = min(SEGMENT_TOKENS, sampling.segment_tokens, max(1, longest // 2))
    return SamplingConfig(
        segment_tokens=segment_tokens,
        max_depth=2,
        width=2,
        initial_branching=1,
        max_response_tokens=min(2 * segment_tokens, longest),
        temperature=sampling.temperature,
        stops=sampling.stops,  # the engines' own stop rule has them too
        attempts=sampling.attempts,
        retry_seconds=sampling.retry_seconds,
    )


async def _sample(driver: TreeDriver, prompts: Sequence[Prompt], engine: Engine) -> list[Tree]:
    trees: list[Tree] = []
    async with aclosing(driver.sample(prompts, step=0)) as results:
        async for result in results:
            if isinstance(result, FailedTree):
                raise EngineError(f"{engine.name} cannot sample: {result.reason}")
            trees.append(result)
    return trees


def _pack_all(trees: Sequence[Tree], max_tokens: int, replicas: int) -> list[list[Pack]]:
    """Pack the trees so that every sampled token counts."""
    graded = [tree.graded([(0.0, Verdict.WRONG)] * len(tree.leaves)) for tree in trees]
    return pack_trees(graded, estimate(graded, LearningConfig()), max_tokens, replicas)


def _compare(
    trees: Sequence[Tree], packs: Sequence[Sequence[Pack]], log_probs: Sequence[Sequence[np.ndarray]]
) -> Comparison:
    """Compare the log-probs of one engine's trees.

    packs: of `_pack_all`, for all replicas. log_probs: the trainer's, float32 [T] for each pack.
    """
    columns: dict[str, list[np.ndarray]] = {"tree": [], "position": [], "engine": [], "trainer": []}
    for pack, computed in zip(chain.from_iterable(packs), chain.from_iterable(log_probs), strict=True):
        sampled = pack.count_pos + pack.count_neg > 0  # context is in another pack too
        columns["tree"].append(pack.tree[sampled])
        columns["position"].append(pack.position[sampled])
        columns["engine"].append(pack.rollout_log_prob[sampled])
        columns["trainer"].append(computed[sampled])
    tree, position, engine, trainer = (np.concatenate(parts) for parts in columns.values())
    difference = np.abs(trainer - engine, dtype=np.float64)
    worst = int(difference.argmax())  # the first NaN, if there is one
    prompt = trees[tree[worst]]
    return Comparison(
        tokens=len(difference),
        mean=float(difference.mean()),
        largest=float(difference[worst]),
        prompt_id=prompt.prompt_id,
        token=int(position[worst]) - len(prompt.prompt) + 1,
        engine=float(engine[worst]),
        trainer=float(trainer[worst]),
    )


def _disagreement(
    comparison: Comparison,
    engine: str,
    temperature: float,
    mean_limit: float,
    max_limit: float,
    suspects: str,
) -> str:
    """The error, in one line."""
    return (
        f"trainer and {engine} disagree on the log-probs of {comparison.tokens} tokens that it sampled at "
        f"temperature {temperature}: they differ by {comparison.mean:.2g} on average "
        f"(log_prob_check.mean_limit is {mean_limit:g}) and by up to {comparison.largest:.2g} "
        f"(log_prob_check.max_limit is {max_limit:g}), at prompt {comparison.prompt_id}, response token "
        f"{comparison.token} (engine {comparison.engine:.4f}, trainer {comparison.trainer:.4f}). "
        f"The usual suspects: {suspects}. log_prob_check.enabled=false trains anyway"
    )
