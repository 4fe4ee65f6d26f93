"""The items that are graded, the grades, and the messages of a grading process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from treepo.verdict import Verdict

PIPE_CLOSED = 97
"""Exit code of a grading process whose reward function has closed the pipe."""


@dataclass(frozen=True, slots=True)
class GradeItem:
    """One response to grade. `prompt` and `extra` are for a user's own reward function.

    extraction: what counts as the answer (treepo.rewards.extraction); by default the pool's `reward.answer`.
    """

    response: str
    answer: str
    prompt: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)
    extraction: str | None = None


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of one response. reward: None if the verdict is `timeout` or `error`.

    answer_text: the text that was taken as the response's answer. message: why there is no reward. terms,
    texts: further numbers and texts of a reward function, by name.
    """

    reward: float | None
    verdict: Verdict
    answer_text: str | None = None
    message: str | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


class Rewards(Protocol):
    """A grader: processes of this machine (RewardPool) or an endpoint (HttpRewards)."""

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """Grade the items, in the same order. Raises ConfigError or RewardError if nothing can be graded."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """A grading process's first message: it can grade, or `failure` is the traceback of why it cannot.

    unconfined: the layers of confinement that the kernel does not have, by name.
    """

    failure: str | None = None
    unconfined: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """An item for a grading process. number: the reply to it has the same."""

    number: int
    item: GradeItem


@dataclass(frozen=True, slots=True)
class Reply:
    """A grading process's answer to one request. The grade of a mathematical answer has no reward yet.

    traceback: of an exception in the grader. retire: whether the worker leaks memory or
    descriptors and should be replaced.
    """

    number: int
    grade: Grade
    traceback: str | None = None
    retire: bool = False
