"""Samples the trees of one step, and chooses those to train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treepo.config.run import RunConfig
from treepo.data.prompts import PromptOrder, PromptSet
from treepo.learning.dynamic_sampling import Dropped, DynamicSampler
from treepo.rewards.shaping import shaped
from treepo.rollout.stats import Stats
from treepo.training.graded_trees import GradedSampler
from treepo.training.run_folder import RunFolder
from treepo.tree import Tree


@dataclass(frozen=True, slots=True)
class Batch:
    """The trees of one step.

    sampled: all trees, graded. trained: the trees to learn from, rewards shaped. dropped: the number of
    others, by reason. stats: the driver's counters.
    """

    sampled: Sequence[Tree]
    trained: Sequence[Tree]
    dropped: Mapping[Dropped, int]
    stats: Stats


class BatchSampler:
    """Samples one batch after another in the order of the training prompts, and writes all trees to the run
    folder.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptSet,
        order: PromptOrder,
        sampler: GradedSampler,
        folder: RunFolder,
    ) -> None:
        self.order = order
        self._config, self._prompts = config, prompts
        self._sampler, self._folder = sampler, folder

    async def sample(self, step: int) -> Batch:
        """Sample, grade and write the trees of a step, and choose those to train.

        Raises EngineError if no tree could be sampled, RewardError if too few responses were graded.
        """
        number = self._config.data.prompts_per_step
        if self._config.learning.dynamic_sampling:
            sampled, batch, dropped = await self._sample_until_full(number, step)
        else:
            batch = sampled = await self._sample_and_write(self.order.next(number), step)
            dropped = {}
        self._sampler.check_grades(f"step {step}")
        return Batch(sampled, [shaped(tree) for tree in batch], dropped, self._sampler.take_stats())

    async def _sample_until_full(
        self, number: int, step: int
    ) -> tuple[list[Tree], list[Tree], Mapping[Dropped, int]]:
        """Sample further prompts in place of trees that teach nothing, for a bounded number of rounds."""
        dynamic = DynamicSampler(number, self._config.learning.max_refills)
        sampled: list[Tree] = []
        used: set[int] = set()
        while missing := dynamic.missing():
            # If an epoch ends between two rounds, the next may begin with a prompt of this step.
            fresh = [index for index in self.order.next(missing) if index not in used]
            used.update(fresh)
            trees = await self._sample_and_write(fresh, step) if fresh else []
            dynamic.offer(trees)
            sampled += trees
        return sampled, dynamic.batch, dynamic.dropped

    async def _sample_and_write(self, indices: Sequence[int], step: int) -> list[Tree]:
        """Sample and grade trees for the training prompts at `indices`."""
        prompts = self._prompts.take(indices)
        trees = await self._sampler.sample(prompts, step)
        answers = {prompt.id: prompt.answer for prompt in prompts}
        for tree in trees:
            self._folder.write_tree(tree, step, answers[tree.prompt_id])
        return trees
