"""What is graded, and what a grader says of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from treepo.tree import Verdict


@dataclass(frozen=True, slots=True)
class GradeItem:
    """One response to grade. `prompt` and `extra` are there for a reward function of the user's own."""

    response: str
    answer: str
    prompt: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Grade:
    """The outcome. reward: None where the verdict is `timeout` or `error`.

    answer_text: what was taken as the response's answer. message: why there is no reward. terms: further
    numbers that a reward function returned, by their name.
    """

    reward: float | None
    verdict: Verdict
    answer_text: str | None = None
    message: str | None = None
    terms: Mapping[str, float] = field(default_factory=dict)


class Rewards(Protocol):
    """Whoever grades: processes of this machine (RewardPool) or an endpoint (HttpRewards)."""

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """One grade an item, in the same order. Raises ConfigError or RewardError where none is possible."""
        ...
