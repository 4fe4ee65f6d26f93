"""Accuracy on the held-out prompts: before, during and after training.

An evaluation is of one weight version. In an asynchronous run it takes place beside the next step, whose
weight sync waits for it; the trees that grow for training meanwhile do not count.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np

from treepo.config.run import RunConfig
from treepo.data.prompts import Prompt
from treepo.data.tokenizer import Tokenizer
from treepo.errors import EngineError
from treepo.evaluation.metrics import evaluation_sampling
from treepo.protocols import EnginePool
from treepo.rewards.grade import Rewards
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.training.metrics import accuracy
from treepo.training.tree_grader import TreeGrader
from treepo.tree import Tree
from treepo.watchdog import sampling

_log = logging.getLogger(__name__)
_POLL_SECONDS = 1.0


class Heldout:
    """The held-out prompts of a run. Every evaluation samples them as step 0, with the same seeds."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        engines: EnginePool,
        rewards: Rewards,
    ) -> None:
        self.prompts = prompts
        self._config, self._engines = config, engines
        sampling = evaluation_sampling(config)
        self._driver = TreeDriver(engines.engines, sampling, tokenizer.decode, config.seed, engines.kv_tokens)
        self._grader = TreeGrader(config.reward, tokenizer, rewards, sampling.max_response_tokens)

    async def accuracy(self, what: str) -> float:
        """The accuracy of the served weights, whose version must not change meanwhile. `what` names the
        evaluation.

        Raises EngineError if no prompt could be answered, RewardError if too few answers could be graded.
        """
        by_id = {prompt.id: prompt for prompt in self.prompts}
        grading: list[asyncio.Task[Tree]] = []
        failures: list[FailedTree] = []
        async with (
            asyncio.TaskGroup() as group,
            aclosing(self._driver.sample(self.prompts, step=0)) as results,
        ):
            with sampling(self._driver, self._engines.engines):
                async for result in results:
                    if isinstance(result, FailedTree):
                        failures.append(result)
                    else:
                        grade = self._grader.grade(result, by_id[result.prompt_id])
                        grading.append(group.create_task(grade))
        if not grading:
            raise EngineError(f"{what}: no prompt could be answered; the last: {failures[-1].reason}")
        if failures:
            answered, number = len(grading), len(self.prompts)
            _log.warning("%s: the accuracy is of %d of %d prompts; the others failed", what, answered, number)
        self._grader.check(what)
        trees = [task.result() for task in grading]
        versions = np.unique(np.concatenate([one.versions for tree in trees for one in tree.segments]))
        assert len(versions) == 1, f"{what}: answers of the versions {versions.tolist()}"
        return accuracy(trees)

    def served(self) -> bool:
        """Whether any engine serves."""
        return any(engine.status == "serving" for engine in self._engines.engines)


class PeriodicEvaluation:
    """The evaluations of `evaluation.every`, one at a time. That of the last step comes after training."""

    def __init__(self, config: RunConfig, heldout: Heldout) -> None:
        self._every = config.evaluation.every if heldout.prompts else None
        self._steps, self._heldout = config.steps, heldout
        self._step = 0
        self._task: asyncio.Task[float] | None = None

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
        self._task = asyncio.create_task(self._heldout.accuracy(f"evaluation after step {step}"))

    async def finish(self) -> tuple[int, float | None]:
        """Wait for the evaluation; returns its step and the accuracy. Raises what `Heldout` raises.

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
