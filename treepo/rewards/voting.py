r"""Group the answers to one problem into classes of mathematically equal ones, for majority votes.

All correct answers are one class, because each equals the gold answer; so a class is correct or wrong as a
whole. A wrong answer is compared with the first answer of each class so far, in the grading processes.
"""

import re
from collections.abc import Awaitable, Callable, Sequence

from treepo.rewards.extraction import BOXED
from treepo.rewards.grade import GradeItem
from treepo.rewards.pool import RewardPool
from treepo.rollout.boxed import last_boxed
from treepo.verdict import Verdict

NO_VOTE = -1
"""The class of a response that casts no vote."""
_CORRECT = 0
_PLAIN = "1"
_INTEGER = re.compile(r"[+-]?\d+")

Equal = Callable[[str, str], Awaitable[bool | None]]
"""Whether two answers are equal; None if that cannot be decided."""


def pool_equality(pool: RewardPool) -> Equal:
    """Compare answers by math-verify in the pool's processes, under their deadline and memory limit.

    The pool must grade mathematics: a user's own reward function compares nothing.
    """

    async def equal(first: str, second: str) -> bool | None:
        response = rf"\boxed{{{second}}}"
        if last_boxed(response) != second:  # the answer contains a box
            return None
        (grade,) = await pool.grade([GradeItem(response, first, extraction=BOXED)])
        return grade.verdict is Verdict.CORRECT if grade.verdict.graded else None

    return equal


async def vote_classes(answers: Sequence[str | None], verdicts: Sequence[Verdict], equal: Equal) -> list[int]:
    """Return a class number for each answer, `NO_VOTE` for a response without an answer or a grade.

    Two answers count as different if their comparison cannot be decided. An answer that cannot be compared
    with a plain number either is compared with no other: it equals its own text only.
    """
    class_of: dict[str, int] = {}
    first_of: dict[int, str] = {}  # the first answer of each class that can be compared
    for answer in dict.fromkeys(_wrong(answers, verdicts)):
        number = await _find(answer, first_of, equal)
        if number is None:
            number = len(class_of) + 1
            first_of[number] = answer
        elif number == NO_VOTE:
            number = len(class_of) + 1
        class_of[answer] = number
    return [
        _CORRECT
        if verdict is Verdict.CORRECT
        else class_of[answer.strip()]
        if verdict is Verdict.WRONG and answer is not None
        else NO_VOTE
        for answer, verdict in zip(answers, verdicts, strict=True)
    ]


def _wrong(answers: Sequence[str | None], verdicts: Sequence[Verdict]) -> list[str]:
    return [
        answer.strip()
        for answer, verdict in zip(answers, verdicts, strict=True)
        if verdict is Verdict.WRONG and answer is not None
    ]


async def _find(answer: str, first_of: dict[int, str], equal: Equal) -> int | None:
    """The class of `answer`: None for a new class, `NO_VOTE` for an answer that cannot be compared."""
    for number, first in list(first_of.items()):
        if _INTEGER.fullmatch(first) and _INTEGER.fullmatch(answer):
            same = _integer(first) == _integer(answer)  # the common case needs no process
        else:
            same = await equal(first, answer)
        if same:
            return number
        if same is None:
            if await equal(_PLAIN, answer) is None:
                return NO_VOTE
            if await equal(_PLAIN, first) is None:
                del first_of[number]
    return None


def _integer(text: str) -> tuple[bool, str]:
    """Whether it is negative, and its digits; int() refuses more than a few thousand digits."""
    digits = text.lstrip("+-").lstrip("0")
    return text.startswith("-") and bool(digits), digits
