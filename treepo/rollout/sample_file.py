"""`treepo rollout`: the sampling half of training, alone. Trees go to disk as they are finished.

config.yaml      the effective configuration, overrides applied
trees.jsonl      one tree a line (treepo.tree.to_json), with the prompt's gold answer; not graded
summary.json     what the rollout came to
log.txt          what it said on the way
"""

import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from typing import BinaryIO, Protocol

from treepo.cluster.ray_engine import EnginePool
from treepo.cluster.ray_session import ray_session
from treepo.config.rollout import RolloutConfig
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.preflight.rollout import Inputs
from treepo.rollout.driver import FailedTree, Stats, TreeDriver
from treepo.rollout.stopping import StopRule
from treepo.rollout.watchdog import watched
from treepo.training.run_folder import LOG, SUMMARY, TREES, log_to, prepare_folder
from treepo.tree import to_json


class Reporter(Protocol):
    """Whoever shows the rollout to a person."""

    def sampling(self, prompts: int) -> None:
        """The engines are ready; so many trees are to come."""

    def tree(self, done: int, stats: Stats, seconds: float) -> None:
        """The tree number `done` is written or given up; `stats` since `sampling`, so many seconds ago."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a rollout came to. Ratios as in `treepo.rollout.driver.Stats`; seconds are those of sampling."""

    prompts: int
    trees: int
    leaves: int
    failed_trees: int
    failed_requests: int
    requests: int
    branchings: int
    fallbacks: int
    decoded_tokens: int
    total_tokens: int
    total_over_unique: float
    cached_token_ratio: float
    seconds: float
    tokens_per_second: float
    trajectories_per_second: float
    failures: tuple[FailedTree, ...]


async def rollout(config: RolloutConfig, inputs: Inputs, reporter: Reporter) -> Summary:
    """Sample a tree for every prompt; what is returned is also written.

    Everything that is started here is ended here, whatever happens. Raises EngineError where no tree could
    be sampled.
    """
    prepare_folder(config.out, config)
    async with AsyncExitStack() as stack:
        stack.enter_context(log_to(config.out / LOG))
        trees = stack.enter_context((config.out / TREES).open("wb"))
        stack.enter_context(ray_session(config.engine.count))
        decode = inputs.tokenizer.decode
        engines = EnginePool(config, StopRule(config.sampling, decode))
        stack.push_async_callback(engines.close)
        await engines.ready()
        driver = TreeDriver(engines.engines, config.sampling, decode, config.seed, engines.capacity)
        async with watched(driver, engines.engines, config.engine.stall_seconds):
            summary = await _sample(driver, inputs.prompts, trees, reporter)
    (config.out / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


async def _sample(
    driver: TreeDriver, prompts: Sequence[Prompt], trees: BinaryIO, reporter: Reporter
) -> Summary:
    """Write every tree to `trees` as soon as it is finished."""
    reporter.sampling(len(prompts))
    answers = {prompt.id: prompt.answer for prompt in prompts}
    failures: list[FailedTree] = []
    started, done = time.perf_counter(), 0
    async with aclosing(driver.sample(prompts, step=0)) as results:
        async for result in results:
            if isinstance(result, FailedTree):
                failures.append(result)
            else:
                trees.write(to_json(result, answer=answers[result.prompt_id]))
                trees.flush()
            done += 1
            reporter.tree(done, driver.stats, time.perf_counter() - started)
    if len(failures) == len(prompts):
        raise EngineError(f"no tree could be sampled; the last: {failures[-1].reason}")
    return _summary(len(prompts), driver.stats, time.perf_counter() - started, failures)


def _summary(prompts: int, stats: Stats, seconds: float, failures: Sequence[FailedTree]) -> Summary:
    return Summary(
        prompts=prompts,
        trees=stats.trees,
        leaves=stats.leaves,
        failed_trees=stats.failed_trees,
        failed_requests=stats.failed_requests,
        requests=stats.requests,
        branchings=stats.branchings,
        fallbacks=stats.fallbacks,
        decoded_tokens=stats.decoded_tokens,
        total_tokens=stats.total_tokens,
        total_over_unique=stats.total_over_unique,
        cached_token_ratio=stats.cached_token_ratio,
        seconds=seconds,
        tokens_per_second=stats.decoded_tokens / seconds,
        trajectories_per_second=stats.leaves / seconds,
        failures=tuple(failures),
    )
