"""`treepo eval`: samples the problems of benchmarks, grades the responses, computes the scores.

All benchmarks are sampled in one stream, so that the end of one does not leave the engines idle. A finished
problem is on disk at once, and the same command continues after it.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from treepo.config.evaluate import EvalConfig, grades_mathematics
from treepo.data.folder_lock import locked
from treepo.data.inputs import EvaluationInputs
from treepo.data.output_folder import write_file
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.evaluation.folder import PLOT, REPORT, EvaluationFolder, GradedProblem, SessionCost
from treepo.evaluation.metrics import ProblemResult
from treepo.evaluation.report.page import evaluation_page
from treepo.evaluation.report.plot import accuracy_plot, curve
from treepo.evaluation.results import RESULTS, results_document
from treepo.protocols import Engine, EnginePool
from treepo.rewards.failures import FailedGrades
from treepo.rewards.grade import GradeItem, Rewards
from treepo.rewards.pool import RewardPool, open_rewards
from treepo.rewards.voting import NO_VOTE, pool_equality, vote_classes
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.garbage import rare_collections
from treepo.rollout.stats import Stats
from treepo.tree import Tree
from treepo.watchdog import Watchdog, sampling, waiting

Start = Callable[[], AbstractAsyncContextManager[EnginePool]]
"""Starts the engines, or connects to a running server; ends what it started on exit."""


class Reporter(Protocol):
    """Shows the evaluation to a person."""

    def starting(self) -> None:
        """Some problem is not finished; the engines start."""

    def sampling(self, problems: int, finished: int) -> None:
        """The engines are ready. finished: problems that an earlier session finished."""

    def problem(self, result: ProblemResult | None, stats: Stats, seconds: float) -> None:
        """A problem is finished, or it failed (None). stats, seconds: since `sampling`."""


async def evaluate(
    config: EvalConfig, inputs: EvaluationInputs, reporter: Reporter, start: Start, *, anew: bool = False
) -> dict[str, Any]:
    """Answer every problem that is not finished; write and return the results.

    anew: set aside what is in the folder. Raises EngineError if no problem could be finished at all, and
    RewardError if too many responses could not be graded.
    """
    with locked(config.out):
        folder = EvaluationFolder(config, inputs.prompts, inputs.model, anew=anew)
        with folder:
            return await _evaluate(config, inputs, folder, reporter, start)


async def _evaluate(
    config: EvalConfig, inputs: EvaluationInputs, folder: EvaluationFolder, reporter: Reporter, start: Start
) -> dict[str, Any]:
    prompts, failures = inputs.prompts, {}
    if len(folder.results) < len(prompts):
        reporter.starting()
        failures = await _sample(config, inputs, folder, reporter, start)
    if not folder.results:
        raise EngineError(f"no problem could be finished; the last: {list(failures.values())[-1]}")
    finished = {
        benchmark.config.label: [
            folder.results[prompt.id] for prompt in benchmark.prompts if prompt.id in folder.results
        ]
        for benchmark in inputs.benchmarks
    }
    results = results_document(
        config.model_dump(mode="json"),
        grades_mathematics(config.reward),
        finished,
        {benchmark.config.label: len(benchmark.prompts) for benchmark in inputs.benchmarks},
        failures,
        total_cost(folder.spent, [problem for problems in finished.values() for problem in problems]),
    )
    _write(folder, results, inputs)
    return results


def total_cost(spent: Mapping[int, SessionCost], finished: Sequence[ProblemResult]) -> dict[str, float]:
    """Cost of all sessions together, without the unfinished problems of a killed session."""
    seconds = sum(session.seconds for session in spent.values())
    decoded = sum(session.decoded_tokens for session in spent.values())
    trajectories = sum(len(problem.verdicts_L) for problem in finished)
    return {
        "sessions": len(spent),
        "seconds": seconds,
        "device_seconds": sum(session.seconds * session.engines for session in spent.values()),
        "decoded_tokens": decoded,
        "prefilled_tokens": sum(session.prefilled_tokens for session in spent.values()),
        "cached_tokens": sum(session.cached_tokens for session in spent.values()),
        "requests": sum(session.requests for session in spent.values()),
        "failed_requests": sum(session.failed_requests for session in spent.values()),
        "tokens_per_second": decoded / seconds,
        "trajectories_per_second": trajectories / seconds,
    }


async def _sample(
    config: EvalConfig, inputs: EvaluationInputs, folder: EvaluationFolder, reporter: Reporter, start: Start
) -> dict[str, str]:
    """Sample and grade the problems that are not finished; return the failures and their reasons."""
    async with AsyncExitStack() as stack:
        watchdog = await stack.enter_async_context(Watchdog(config.out, config.engine.stall_seconds))
        rewards = await stack.enter_async_context(open_rewards(config.reward))
        pool = await stack.enter_async_context(start())
        watchdog.engines = pool.engines
        watchdog.phase("evaluate")
        decode = inputs.tokenizer.decode
        driver = TreeDriver(pool.engines, config.sampling, decode, config.seed, pool.kv_tokens)
        session = _Session(
            config,
            inputs,
            folder,
            reporter,
            rewards,
            driver,
            pool.engines,
            FailedGrades(config.reward.max_failed_share),
        )
        return await session.run()


@dataclass(slots=True, eq=False)
class _Session:
    """The sampling of one process."""

    config: EvalConfig
    inputs: EvaluationInputs
    folder: EvaluationFolder
    reporter: Reporter
    rewards: Rewards
    driver: TreeDriver
    engines: Sequence[Engine]
    failed: FailedGrades
    failures: dict[str, str] = field(default_factory=dict)
    started: float = 0.0

    async def run(self) -> dict[str, str]:
        prompts = self.inputs.prompts
        pending = [prompt for name, prompt in prompts.items() if name not in self.folder.results]
        self.reporter.sampling(len(prompts), len(prompts) - len(pending))
        self.started = time.perf_counter()
        number = max(self.folder.spent, default=-1) + 1
        async with asyncio.TaskGroup() as group, aclosing(self.driver.sample(pending, step=0)) as results:
            with rare_collections(), sampling(self.driver, self.engines):
                async for result in results:
                    if isinstance(result, FailedTree):
                        self._fail(result.prompt_id, result.reason)
                    else:
                        group.create_task(self._finish(result, prompts[result.prompt_id], number))
        self.failed.check_and_clear("this evaluation")
        return self.failures

    def _fail(self, problem: str, reason: str) -> None:
        """Write nothing of the problem, so that the next command tries it again."""
        self.failures[problem] = reason
        self._report(None)

    async def _finish(self, tree: Tree, prompt: Prompt, session: int) -> None:
        """Grade the responses, vote, and write the problem."""
        texts = [self.inputs.tokenizer.decode(tree.response(leaf)) for leaf in tree.leaves]
        items = [GradeItem(text, prompt.answer, prompt.text, prompt.extra) for text in texts]
        with waiting("a finished tree", f"the grader: {len(items)} responses to prompt {prompt.id}"):
            grades = await self.rewards.grade(items)
        verdicts = [grade.verdict for grade in grades]
        self.failed.add(grades)
        if not any(verdict.graded for verdict in verdicts):
            self._fail(prompt.id, f"none of its responses could be graded: {grades[0].message}")
            return
        if grades_mathematics(self.config.reward):
            assert isinstance(self.rewards, RewardPool)
            answers = [grade.answer_text for grade in grades]
            classes = await vote_classes(answers, verdicts, pool_equality(self.rewards))
        else:
            classes = [NO_VOTE] * len(texts)  # the user's own grader extracts no answer
        graded = tree.graded([(grade.reward, grade.verdict) for grade in grades])
        answered = GradedProblem(graded, texts, grades, classes)
        self._report(self.folder.write(answered, self._spent(session)))

    def _spent(self, session: int) -> SessionCost:
        stats = self.driver.stats
        return SessionCost(
            session=session,
            engines=len(self.engines),
            seconds=time.perf_counter() - self.started,
            decoded_tokens=stats.decoded_tokens,
            prefilled_tokens=stats.prompt_tokens - stats.cached_tokens,
            cached_tokens=stats.cached_tokens,
            requests=stats.requests,
            failed_requests=stats.failed_requests,
        )

    def _report(self, result: ProblemResult | None) -> None:
        self.reporter.problem(result, self.driver.stats, time.perf_counter() - self.started)


def _write(folder: EvaluationFolder, results: dict[str, Any], inputs: EvaluationInputs) -> None:
    plot = accuracy_plot([curve(results, folder.path.absolute().name)])
    write_file(folder.path / RESULTS, json.dumps(results, indent=1) + "\n")
    write_file(folder.path / PLOT, plot)
    write_file(
        folder.path / REPORT,
        evaluation_page(results, folder.problems, inputs.prompts, inputs.tokenizer.decode, plot),
    )
