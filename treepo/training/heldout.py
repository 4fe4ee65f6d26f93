"""Accuracy on the held-out prompts: before, during and after training."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from treepo.config.run import RunConfig
from treepo.data.prompts import Prompt
from treepo.data.tokenizer import Tokenizer
from treepo.errors import EngineError
from treepo.evaluation.metrics import evaluation_sampling
from treepo.protocols import EnginePool
from treepo.rewards.grade import Rewards
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.watchdog import watched
from treepo.training.metrics import accuracy
from treepo.training.tree_grader import TreeGrader
from treepo.tree import Tree


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
            watched(self._driver, self._engines.engines, self._config.engine.stall_seconds),
            aclosing(self._driver.sample(self.prompts, step=0)) as results,
        ):
            async for result in results:
                if isinstance(result, FailedTree):
                    failures.append(result)
                else:
                    grade = self._grader.grade(result, by_id[result.prompt_id])
                    grading.append(group.create_task(grade))
        if not grading:
            raise EngineError(f"{what}: no prompt could be answered; the last: {failures[-1].reason}")
        self._grader.check(what)
        trees = [task.result() for task in grading]
        versions = {int(version) for tree in trees for one in tree.segments for version in one.versions}
        assert len(versions) == 1, f"{what}: answers of the versions {sorted(versions)}"
        return accuracy(trees)
