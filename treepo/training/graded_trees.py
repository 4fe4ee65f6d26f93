"""Samples trees for prompts and grades each as soon as it is finished."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.data.tokenizer import Tokenizer
from treepo.errors import EngineError
from treepo.protocols import EnginePool
from treepo.rewards.failures import FailedGrades
from treepo.rewards.grade import GradeItem, Rewards
from treepo.rewards.shaping import with_grades
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.stats import Stats
from treepo.rollout.watchdog import watched
from treepo.tree import Tree


class GradedSampler:
    """Samples and grades trees with one sampling configuration.

    Use one for the whole run: its driver learns how large trees become.
    """

    def __init__(
        self,
        config: RunConfig,
        sampling: SamplingConfig,
        tokenizer: Tokenizer,
        engines: EnginePool,
        rewards: Rewards,
    ) -> None:
        self._config, self._tokenizer, self._engines, self._rewards = config, tokenizer, engines, rewards
        self._driver = TreeDriver(engines.engines, sampling, tokenizer.decode, config.seed, engines.kv_tokens)
        self._failed_grades = FailedGrades(config.reward.max_failed_share)

    async def sample(self, prompts: Sequence[Prompt], step: int) -> list[Tree]:
        """Return the graded trees in the order of `prompts`, without those that failed.

        Raises EngineError if every tree failed.
        """
        by_id = {prompt.id: prompt for prompt in prompts}
        grading: dict[str, asyncio.Task[Tree]] = {}
        failures: list[FailedTree] = []
        async with (
            asyncio.TaskGroup() as group,
            watched(self._driver, self._engines.engines, self._config.engine.stall_seconds),
            aclosing(self._driver.sample(prompts, step)) as results,
        ):
            async for result in results:
                if isinstance(result, FailedTree):
                    failures.append(result)
                else:
                    grade = self._grade(result, by_id[result.prompt_id])
                    grading[result.prompt_id] = group.create_task(grade)
        if not grading:
            raise EngineError(f"step {step}: no tree could be sampled; the last: {failures[-1].reason}")
        return [grading[prompt.id].result() for prompt in prompts if prompt.id in grading]

    def check_grades(self, what: str) -> None:
        """Raise RewardError if too many responses since the last call could not be graded; `what` names
        them.
        """
        self._failed_grades.check_and_clear(what)

    def take_stats(self) -> Stats:
        """Return the driver's counters since the last call."""
        return self._driver.take_stats()

    async def _grade(self, tree: Tree, prompt: Prompt) -> Tree:
        responses = [self._tokenizer.decode(tree.response(leaf)) for leaf in tree.leaves]
        grades = await self._rewards.grade(
            [GradeItem(response, prompt.answer, prompt.text, prompt.extra) for response in responses]
        )
        self._failed_grades.add(grades)
        limit = self._config.sampling.max_response_tokens
        return with_grades(tree, responses, grades, self._config.reward, limit)
