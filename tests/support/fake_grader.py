"""A grader of the fake engine's responses: a response is right if most of its tokens are odd.

So responses that share tokens have correlated grades.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from treepo.data.prompts import Prompt
from treepo.rewards.grade import Grade
from treepo.verdict import Verdict


def right(tokens: np.ndarray) -> bool:
    return 2 * int((tokens % 2).sum()) > len(tokens)


@dataclass
class FakeGrader:
    """failing: every so many grades is a timeout; 0: none is. blocks: of these prompts no response is graded
    until `released`. graded: how often each response was.
    """

    failing: int = 0
    blocks: frozenset[str] = frozenset()
    released: asyncio.Event = field(default_factory=asyncio.Event)
    graded: Counter[tuple[str, bytes]] = field(default_factory=Counter)

    async def grade(self, prompt: Prompt, response: np.ndarray) -> Grade:
        self.graded[prompt.id, response.tobytes()] += 1
        if prompt.id in self.blocks:
            await self.released.wait()
        await asyncio.sleep(0)
        return self.verdict(response)

    def verdict(self, response: np.ndarray) -> Grade:
        if self.failing and int(response.sum()) % self.failing == 0:
            return Grade(None, Verdict.TIMEOUT, message="too slow on purpose")
        verdict = Verdict.CORRECT if right(response) else Verdict.WRONG
        return Grade(float(right(response)), verdict)
