"""`treepo rollout`: samples a tree for every prompt of a file, without grading or training.

    config.yaml      the effective configuration, overrides applied
    trees.jsonl      one tree a line (treepo.tree.to_json), with the prompt's gold answer; not graded
    summary.json     totals of the rollout
    log.txt          the log

A tree is written as soon as it is finished.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import asdict, dataclass
from typing import Protocol

from treepo.config.rollout import RolloutConfig
from treepo.data.folder_lock import locked
from treepo.data.inputs import RolloutInputs
from treepo.data.output_folder import LOG, SUMMARY, TREES, GrowingFile, log_to, prepare_folder, write_file
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.protocols import EnginePool
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.garbage import rare_collections
from treepo.rollout.stats import Stats
from treepo.tree import to_json
from treepo.watchdog import Watchdog, sampling


class Reporter(Protocol):
    """Shows the rollout to a person."""

    def sampling(self, prompts: int) -> None:
        """The engines are ready; a tree for each of `prompts` prompts follows."""

    def tree(self, done: int, stats: Stats, seconds: float) -> None:
        """Tree number `done` is written, or it failed. stats, seconds: since `sampling`."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals of a rollout. Ratios as in `treepo.rollout.stats.Stats`. seconds: of sampling alone."""

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


async def rollout(
    config: RolloutConfig,
    inputs: RolloutInputs,
    reporter: Reporter,
    start: Callable[[], AbstractAsyncContextManager[EnginePool]],
) -> Summary:
    """Sample a tree for every prompt; the summary is written and returned.

    start: starts the engines, and ends them on exit. Raises EngineError if no tree could be sampled.
    """
    with locked(config.out):
        prepare_folder(config.out, config)
        with log_to(config.out / LOG), GrowingFile(config.out / TREES) as trees:
            async with Watchdog(config.out, config.engine.stall_seconds) as watchdog, start() as pool:
                watchdog.engines = pool.engines
                watchdog.phase("sample")
                decode = inputs.tokenizer.decode
                driver = TreeDriver(pool.engines, config.sampling, decode, config.seed, pool.kv_tokens)
                with rare_collections(), sampling(driver, pool.engines):
                    summary = await _sample(driver, inputs.prompts, trees, reporter)
        write_file(config.out / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
    return summary


async def _sample(
    driver: TreeDriver, prompts: Sequence[Prompt], trees: GrowingFile, reporter: Reporter
) -> Summary:
    """Write every tree to the file `trees` as soon as it is finished."""
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
