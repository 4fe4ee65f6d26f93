"""`treepo eval`: sample benchmarks, grade, score. No trainer is built.

All benchmarks are sampled in one stream, so that the end of one does not leave the engines idle. What is
finished is on disk at once; the same command goes on from it.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_rollout.remote import ServerEngine
from treepo.cluster.ray_engine import EnginePool
from treepo.cluster.ray_session import gpu_count, ray_session
from treepo.config.engine import EngineConfig
from treepo.config.evaluate import EvalConfig, grades_mathematics
from treepo.config.run import ModelConfig
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.evaluation.folder import PLOT, REPORT, RESULTS, Answered, EvaluationFolder, Spent
from treepo.evaluation.metrics import ProblemResult
from treepo.evaluation.report.page import evaluation_page
from treepo.evaluation.report.plot import accuracy_plot, curve
from treepo.evaluation.results import results_document
from treepo.preflight.evaluate import Inputs
from treepo.protocols import Engine
from treepo.rewards.failures import FailedGrades
from treepo.rewards.grade import GradeItem, Rewards
from treepo.rewards.pool import RewardPool, open_rewards
from treepo.rewards.voting import NO_VOTE, pool_equality, vote_classes
from treepo.rollout.driver import FailedTree, Stats, TreeDriver
from treepo.rollout.stopping import StopRule
from treepo.tree import Tree


class Reporter(Protocol):
    """Whoever shows the evaluation to a person."""

    def starting(self) -> None:
        """There is something to sample; the engines start."""

    def sampling(self, problems: int, finished: int) -> None:
        """The engines are ready; of so many problems so many were finished by an earlier session."""

    def problem(self, result: ProblemResult | None, stats: Stats, seconds: float) -> None:
        """A problem is finished, or (None) given up; `stats` since `sampling`, so many seconds ago."""


@dataclass(frozen=True, slots=True)
class _OwnEngines:
    """What the engine pool wants to know."""

    model: ModelConfig
    engine: EngineConfig
    seed: int


async def evaluate(
    config: EvalConfig, inputs: Inputs, reporter: Reporter, *, anew: bool = False
) -> dict[str, Any]:
    """Answer every problem that is not finished; write and return the results.

    Everything that is started here is ended here, whatever happens. Raises EngineError where no problem could
    be finished at all, and RewardError where too many responses could not be graded.
    """
    prompts = inputs.prompts
    folder = EvaluationFolder(config, prompts, inputs.model, anew=anew)
    with folder:
        failures: dict[str, str] = {}
        if len(folder.results) < len(prompts):
            reporter.starting()
            failures = await _sample(config, inputs, folder, reporter)
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


def total_cost(spent: Mapping[int, Spent], finished: Sequence[ProblemResult]) -> dict[str, float]:
    """All sessions together. What a killed session had not finished is not in it."""
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
    config: EvalConfig, inputs: Inputs, folder: EvaluationFolder, reporter: Reporter
) -> dict[str, str]:
    """Sample and grade what is not finished; returns the reasons of what failed."""
    async with AsyncExitStack() as stack:
        rewards = await stack.enter_async_context(open_rewards(config.reward))
        engines, kv_tokens = await stack.enter_async_context(_engines(config, inputs))
        driver = TreeDriver(engines, config.sampling, inputs.tokenizer.decode, config.seed, kv_tokens)
        session = _Session(
            config,
            inputs,
            folder,
            reporter,
            rewards,
            driver,
            len(engines),
            FailedGrades(config.reward.max_failed_share),
        )
        return await session.run()


@asynccontextmanager
async def _engines(
    config: EvalConfig, inputs: Inputs
) -> AsyncIterator[tuple[Sequence[Engine], Sequence[int] | int | None]]:
    """Engines that are ready, and the tokens that each holds: a server's, or our own."""
    sampling = config.sampling
    if config.model.url is not None:
        looks = sampling.stops.boxed == "end" or sampling.stops.repetition.check != "off"
        async with ServerEngine(
            config.model.url,
            inputs.tokenizer.end_tokens,
            config.engine.request_seconds,
            boundaries=looks,
        ) as server:
            yield [server], inputs.kv_tokens
        return
    assert config.model.path is not None
    model = ModelConfig(path=config.model.path, dtype=config.model.dtype)
    async with AsyncExitStack() as stack:
        stack.enter_context(ray_session(config.engine.count or 1))
        own = _OwnEngines(model, config.engine.on(gpu_count()), config.seed)
        pool = EnginePool(own, StopRule(sampling, inputs.tokenizer.decode))
        stack.push_async_callback(pool.close)
        await pool.ready()
        yield pool.engines, pool.capacity


@dataclass(slots=True, eq=False)
class _Session:
    """The sampling of one process."""

    config: EvalConfig
    inputs: Inputs
    folder: EvaluationFolder
    reporter: Reporter
    rewards: Rewards
    driver: TreeDriver
    engines: int
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
            async for result in results:
                if isinstance(result, FailedTree):
                    self._fail(result.prompt_id, result.reason)
                else:
                    group.create_task(self._finish(result, prompts[result.prompt_id], number))
        self.failed.check_and_clear("this evaluation")
        return self.failures

    def _fail(self, problem: str, reason: str) -> None:
        """Nothing of the problem is written, so that the next command tries it again."""
        self.failures[problem] = reason
        self._report(None)

    async def _finish(self, tree: Tree, prompt: Prompt, session: int) -> None:
        """Grade, vote, write."""
        texts = [self.inputs.tokenizer.decode(tree.response(leaf)) for leaf in tree.leaves]
        grades = await self.rewards.grade(
            [GradeItem(text, prompt.answer, prompt.text, prompt.extra) for text in texts]
        )
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
            classes = [NO_VOTE] * len(texts)  # a grader of the user's own extracts no answer
        graded = tree.graded([(grade.reward, grade.verdict) for grade in grades])
        answered = Answered(graded, texts, grades, classes)
        self._report(self.folder.write(answered, self._spent(session)))

    def _spent(self, session: int) -> Spent:
        stats = self.driver.stats
        return Spent(
            session=session,
            engines=self.engines,
            seconds=time.perf_counter() - self.started,
            decoded_tokens=stats.decoded_tokens,
            prefilled_tokens=stats.prompt_tokens - stats.cached_tokens,
            cached_tokens=stats.cached_tokens,
            requests=stats.requests,
            failed_requests=stats.failed_requests,
        )

    def _report(self, result: ProblemResult | None) -> None:
        self.reporter.problem(result, self.driver.stats, time.perf_counter() - self.started)


def _write(folder: EvaluationFolder, results: dict[str, Any], inputs: Inputs) -> None:
    plot = accuracy_plot([curve(results, str(folder.path))])
    folder.write_file(RESULTS, json.dumps(results, indent=1) + "\n")
    folder.write_file(PLOT, plot)
    folder.write_file(
        REPORT, evaluation_page(results, folder.problems, inputs.prompts, inputs.tokenizer.decode, plot)
    )
