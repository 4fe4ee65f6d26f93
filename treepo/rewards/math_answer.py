r"""Grade mathematics: compare the last boxed answer of a response with the gold answer, by math-verify.

Nothing here bounds time or memory. math-verify's own time-outs use SIGALRM, which a long operation inside one
C function ignores; they are off, and the grading process (treepo.rewards.worker) is killed instead. If a
comparison raises, math-verify says "not equal"; this module lets the exception through.
"""

import math
import re
import sys
from itertools import product

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig
from sympy import Expr

from treepo.rewards.grade import Grade, GradeItem
from treepo.rollout.boxed import last_boxed
from treepo.tree import Verdict

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
# 4.5e33 as programs write it; LaTeX reads it as 4.5 times Euler's number times 33.
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![\w.^{])")
# A point that ends a sentence, or a number as in 1./3: LaTeX's grammar refuses the whole text for it.
_IDLE_POINT = re.compile(r"(?<=\d)\.(?![\d.])|(?<![\\.])[.,]$")


def grade_math(response: str, answer: str) -> tuple[Verdict, str | None]:
    """Return the verdict (`correct`, `wrong` or `no_answer`) and the text of the boxed answer.

    Raises what math-verify raises if it can neither accept nor refuse the answer.
    """
    boxed = last_boxed(response)
    if boxed is None:
        return Verdict.NO_ANSWER, None
    return (Verdict.CORRECT if equal_answers(answer, boxed) else Verdict.WRONG), boxed


def math_grader(item: GradeItem) -> Grade:
    """Grade one item; the pool adds the reward of the verdict."""
    verdict, answer_text = grade_math(item.response, item.answer)
    return Grade(None, verdict, answer_text)


def equal_answers(gold: str, other: str) -> bool:
    """Whether two answers are mathematically equal. Not symmetric: the form of `gold` decides the rules."""
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
    """The comparable forms of an answer: its sympy expressions, if it has any, and its text."""
    text = _IDLE_POINT.sub("", answer.strip())
    forms = _parse_latex(text)
    if (scientific := _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)) != text:
        forms += _parse_latex(scientific)
    return forms


def _parse_latex(text: str) -> list:
    return parse(rf"\boxed{{{text}}}", _TARGETS, parsing_timeout=0, raise_on_error=True)


def _decimals(gold: object) -> int:
    """Decimals to which math-verify rounds before it compares decimal fractions: by default 6.

    That would round 1e-8 to 0, so a tiny gold answer keeps six significant digits.
    """
    if not (isinstance(gold, Expr) and gold.is_number and gold.is_real) or gold == 0 or abs(gold) >= 1e-4:
        return 6
    return 6 + math.floor(-math.log10(max(abs(float(gold)), sys.float_info.min)))
