"""Grades finished trees, and stops a run whose grader fails too often."""

from collections.abc import Sequence

import numpy as np

from treepo.config.reward import RewardConfig
from treepo.data.prompts import Prompt
from treepo.data.tokenizer import Tokenizer
from treepo.rewards.failures import FailedGrades
from treepo.rewards.grade import Grade, GradeItem, Rewards
from treepo.rewards.shaping import with_grades
from treepo.tree import Tree
from treepo.watchdog import waiting


class TreeGrader:
    """Grades trees of one kind, of training or of an evaluation.

    max_response_tokens: length of a response that was cut off.
    """

    def __init__(
        self, config: RewardConfig, tokenizer: Tokenizer, rewards: Rewards, max_response_tokens: int
    ) -> None:
        self._config, self._tokenizer, self._rewards = config, tokenizer, rewards
        self._max_response_tokens = max_response_tokens
        self._failed_grades = FailedGrades(config.max_failed_share)

    async def grade_response(self, prompt: Prompt, response: np.ndarray) -> Grade:
        """Grade one response, int32 [T], of a tree that still grows."""
        item = _item(prompt, self._tokenizer.decode(response))
        with waiting("a growing tree", f"the grader: a response to prompt {prompt.id}"):
            (grade,) = await self._rewards.grade([item])
        return grade

    async def grade(self, tree: Tree, prompt: Prompt, grades: Sequence[Grade] | None = None) -> Tree:
        """Return the tree of `prompt` with a verdict and a reward at each leaf.

        grades: of the leaves, if its responses were graded while it grew.
        """
        responses = [self._tokenizer.decode(tree.response(leaf)) for leaf in tree.leaves]
        if grades is None:
            items = [_item(prompt, response) for response in responses]
            with waiting("a finished tree", f"the grader: {len(items)} responses to prompt {prompt.id}"):
                grades = await self._rewards.grade(items)
        self._failed_grades.add(grades)
        return with_grades(tree, responses, grades, self._config, self._max_response_tokens)

    def check(self, what: str) -> None:
        """Raise RewardError if too many responses since the last call could not be graded; `what` names
        them.
        """
        self._failed_grades.check_and_clear(what)


def _item(prompt: Prompt, response: str) -> GradeItem:
    return GradeItem(response, prompt.answer, prompt.text, prompt.extra)
