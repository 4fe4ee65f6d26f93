"""Accuracy on the held-out sets: before, during and after training.

An evaluation is of one weight version and of all sets. In an asynchronous run it takes place beside the next
step, whose weight sync waits for it; the trees that grow for training meanwhile do not count.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from treepo.config.heldout import HeldoutSetConfig
from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.data.tokenizer import Tokenizer
from treepo.errors import EngineError
from treepo.protocols import EnginePool
from treepo.rewards.grade import Rewards
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.training.metrics import heldout_metrics
from treepo.training.tree_grader import TreeGrader
from treepo.training.tree_supply import FinishedTree
from treepo.tree import Tree
from treepo.watchdog import sampling

_log = logging.getLogger(__name__)
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation has found.

    metrics: of all sets, by their names in metrics.jsonl. trees: of each set, in the order of its prompts.
    """

    metrics: Mapping[str, float]
    trees: Mapping[str, Sequence[FinishedTree]]


class Heldout:
    """The held-out sets of a run. Every evaluation samples them as step 0, with the same seeds.

    prompts: of each set, by its name.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Mapping[str, Sequence[Prompt]],
        tokenizer: Tokenizer,
        engines: EnginePool,
        rewards: Rewards,
    ) -> None:
        self._engines = engines
        self._sets = {
            name: _HeldoutSet(config, one, prompts[name], tokenizer, engines, rewards)
            for name, one in config.heldout_sets.items()
            if prompts[name]
        }

    @property
    def empty(self) -> bool:
        """Whether there is nothing to evaluate."""
        return not self._sets

    async def evaluate(self, what: str) -> Evaluation:
        """Evaluate the served weights, whose version must not change meanwhile, on one set after the other.
        `what` names the evaluation.

        Raises EngineError if no prompt of a set could be answered, RewardError if too few answers could be
        graded.
        """
        trees = {
            name: await one.sample(what if len(self._sets) == 1 else f"{what}, set {name}")
            for name, one in self._sets.items()
        }
        answers = [finished.tree for finished_trees in trees.values() for finished in finished_trees]
        versions = np.unique(np.concatenate([one.versions for tree in answers for one in tree.segments]))
        assert len(versions) == 1, f"{what}: answers of the versions {versions.tolist()}"
        metrics: dict[str, float] = {}
        for name, finished_trees in trees.items():
            metrics |= heldout_metrics(name, [finished.tree for finished in finished_trees])
        return Evaluation(metrics, trees)

    def served(self) -> bool:
        """Whether any engine serves."""
        return any(engine.status == "serving" for engine in self._engines.engines)


class _HeldoutSet:
    """One set: its prompts, and how they are sampled and graded."""

    def __init__(
        self,
        config: RunConfig,
        options: HeldoutSetConfig,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        engines: EnginePool,
        rewards: Rewards,
    ) -> None:
        self._prompts, self._engines = prompts, engines
        sampling = _sampling(config.sampling, options)
        self._driver = TreeDriver(engines.engines, sampling, tokenizer.decode, config.seed, engines.kv_tokens)
        self._grader = TreeGrader(config.reward, tokenizer, rewards, sampling.max_response_tokens)

    async def sample(self, what: str) -> list[FinishedTree]:
        """Sample and grade the answers to all prompts. Raises what `Heldout.evaluate` raises."""
        by_id = {prompt.id: prompt for prompt in self._prompts}
        grading: dict[str, asyncio.Task[Tree]] = {}
        failures: list[FailedTree] = []
        async with (
            asyncio.TaskGroup() as group,
            aclosing(self._driver.sample(self._prompts, step=0)) as results,
        ):
            with sampling(self._driver, self._engines.engines):
                async for result in results:
                    if isinstance(result, FailedTree):
                        failures.append(result)
                    else:
                        grade = self._grader.grade(result, by_id[result.prompt_id])
                        grading[result.prompt_id] = group.create_task(grade)
        if not grading:
            raise EngineError(f"{what}: no prompt could be answered; the last: {failures[-1].reason}")
        if failures:
            answered, number = len(grading), len(self._prompts)
            _log.warning("%s: the accuracy is of %d of %d prompts; the others failed", what, answered, number)
        self._grader.check(what)
        return [
            FinishedTree(grading[prompt.id].result(), prompt.answer)
            for prompt in self._prompts
            if prompt.id in grading
        ]


def _sampling(training: SamplingConfig, options: HeldoutSetConfig) -> SamplingConfig:
    """The stops and retries of training, but independent samples with the options of a set."""
    longest = options.max_response_tokens or training.max_response_tokens
    return training.model_copy(
        update={
            "mode": "sequential",
            "width": options.samples,
            "max_response_tokens": longest,
            **options.model_dump(include={"temperature", "top_p", "top_k", "min_p"}),
        }
    )


class PeriodicEvaluation:
    """The evaluations of `evaluation.every`, one at a time. That of the last step comes after training."""

    def __init__(self, config: RunConfig, heldout: Heldout) -> None:
        self._every = None if heldout.empty else config.evaluation.every
        self._steps, self._heldout = config.steps, heldout
        self._step = 0
        self._task: asyncio.Task[Evaluation] | None = None

    @property
    def running(self) -> bool:
        """Whether an evaluation was begun and not finished."""
        return self._task is not None

    def due(self, step: int) -> bool:
        """Whether an evaluation follows this step."""
        return self._every is not None and 0 < step < self._steps and step % self._every == 0

    def begin(self, step: int) -> None:
        """Begin to evaluate the weights of a step, which are served until `finish`."""
        assert self._task is None
        self._step = step
        self._task = asyncio.create_task(self._heldout.evaluate(f"evaluation after step {step}"))

    async def finish(self) -> tuple[int, Evaluation | None]:
        """Wait for the evaluation; returns its step and what it found. Raises what `Heldout` raises.

        If no engine is left to answer, gives up and returns None: engines that are restarted beside a trainer
        at work serve after the weight sync that waits for this call.
        """
        assert self._task is not None
        while not self._task.done():
            await asyncio.wait((self._task,), timeout=_POLL_SECONDS)
            if not self._task.done() and not self._heldout.served():
                _log.warning("the evaluation after step %d is given up: no engine serves", self._step)
                await self.cancel()
                return self._step, None
        task, self._task = self._task, None
        return self._step, task.result()

    async def cancel(self) -> None:
        """Cancel the evaluation that was begun, if any."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
