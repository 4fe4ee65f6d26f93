"""Before the first step: every engine samples a few short trees, and the trainer must agree on their log-probs.

The trees are sampled as in training (the same driver, temperature and cache; the same prompts in every run
and on every engine), so that what is wrong with an engine's weights or temperature is wrong here too.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Protocol

import numpy as np

from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.errors import EngineError, LogProbCheckError
from treepo.learning.packing import Pack, attach
from treepo.protocols import Engine
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.training.log_prob_comparison import compare, disagreement, pack_sampled
from treepo.tree import Tree

SEGMENT_TOKENS = 64  # at most: a check costs seconds

_log = logging.getLogger(__name__)


class NamedEngine(Engine, Protocol):
    """An engine that an error can name."""

    name: str


class Scorer(Protocol):
    """All trainer ranks (treepo.cluster.trainer_group)."""

    async def log_probs(
        self, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]: ...


def short_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """Two leaves below a shared segment, at the training's temperature and within its lengths."""
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


async def check_log_probs(
    config: RunConfig,
    prompts: Sequence[Prompt],
    decode: Callable[[np.ndarray], str],
    engines: Sequence[NamedEngine],
    trainer: Scorer,
) -> dict[str, float]:
    """The largest `mean` and `max` of |trainer's log-prob - engine's| over the engines, and the `tokens` that
    were compared. Raises LogProbCheckError where an engine's are past the limits of `config.log_prob_check`.
    """
    sampling = short_sampling(config.sampling)
    fixed = prompts[: config.log_prob_check.prompts]
    forests = await asyncio.gather(
        *(_sample(TreeDriver([engine], sampling, decode, config.seed), fixed, engine) for engine in engines)
    )
    limits = config.log_prob_check.limits(config.model.dtype)
    figures = {"mean": 0.0, "max": 0.0, "tokens": 0}
    for engine, trees in zip(engines, forests, strict=True):
        packs = pack_sampled(trees, config.trainer.max_tokens_per_pack, config.trainer.parallel.data)
        scores = await trainer.log_probs(packs, sampling.temperature)
        comparison = compare(trees, attach(packs, "old_log_prob", scores))
        if not comparison.within(*limits):
            raise LogProbCheckError(disagreement(comparison, engine.name, sampling.temperature, *limits))
        figures["mean"] = max(figures["mean"], comparison.mean)
        figures["max"] = max(figures["max"], comparison.largest)
        figures["tokens"] += comparison.tokens
    _log.info(
        "trainer and engines agree on %d sampled tokens: log-probs differ by %.2g on average (limit %g) and by "
        "up to %.2g (limit %g)",
        figures["tokens"],
        figures["mean"],
        limits[0],
        figures["max"],
        limits[1],
    )
    return figures


async def _sample(driver: TreeDriver, prompts: Sequence[Prompt], engine: NamedEngine) -> list[Tree]:
    trees: list[Tree] = []
    async with aclosing(driver.sample(prompts, step=0)) as results:
        async for result in results:
            if isinstance(result, FailedTree):
                raise EngineError(f"{engine.name} cannot sample: {result.reason}")
            trees.append(result)
    return trees
