r"""Grading of mathematics: the last boxed answer of a response against the gold answer, by math-verify.

Nothing here bounds time or memory: math-verify's own time-outs rest on SIGALRM, which a long operation
inside one C function does not notice, so they are off and the process around this (treepo.rewards.worker)
is what gets killed. math-verify answers "not equal" when a comparison raises; here it raises.
"""

import math
import re
from itertools import product

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

from treepo.boxed import last_boxed
from treepo.rewards.grade import Grade, GradeItem
from treepo.tree import Verdict

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d*)?|-?\.\d+)[eE]([+-]?\d+)")


def grade_math(response: str, answer: str) -> tuple[Verdict, str | None]:
    """The verdict, `correct`, `wrong` or `no_answer`, and the text of the boxed answer that it is about.

    Raises whatever math-verify raises when it can neither accept nor refuse the answer.
    """
    boxed = last_boxed(response)
    if boxed is None or not boxed.strip():
        return Verdict.NO_ANSWER, None
    return (Verdict.CORRECT if equal_answers(answer, boxed) else Verdict.WRONG), boxed


def math_grader(item: GradeItem) -> Grade:
    """`grade_math` as a grade, the reward still open."""
    verdict, answer_text = grade_math(item.response, item.answer)
    return Grade(None, verdict, answer_text)


def equal_answers(gold: str, other: str) -> bool:
    """Whether two answers are mathematically equal. Not symmetric: the form of `gold` decides what counts."""
    if gold.strip() == other.strip():
        return True
    failure: Exception | None = None
    for gold_form, other_form in product(_parse(gold), _parse(other)):
        try:
            if verify(
                gold_form,
                other_form,
                float_rounding=_decimals(gold_form),
                timeout_seconds=0,
                raise_on_error=True,
            ):
                return True
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return False


def _parse(answer: str) -> list:
    r"""The forms of an answer that can be compared: a sympy expression if it is one, and its text.

    `4.5e33`, as programs write it, would be read as 4.5 times Euler's number times 33.
    """
    if scientific := _SCIENTIFIC.fullmatch(answer.strip()):
        answer = rf"{scientific[1]} \times 10^{{{scientific[2]}}}"
    return parse(rf"\boxed{{{answer}}}", _TARGETS, parsing_timeout=0, raise_on_error=True)


def _decimals(gold: object) -> int:
    """Decimals to which math-verify rounds before it compares decimal fractions: 6, as it does by default.

    That would make 0 of 1e-8, so a tiny gold answer keeps six significant digits.
    """
    is_number = getattr(gold, "is_number", False) and getattr(gold, "is_real", False)
    size = abs(float(gold)) if is_number else 1.0  # type: ignore[arg-type]  # sympy numbers convert
    return 6 if size == 0 or size >= 1e-4 else 6 + math.floor(-math.log10(size))
