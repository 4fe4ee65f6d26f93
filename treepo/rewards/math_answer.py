r"""Grade mathematics: compare the answer of a response with the gold answer, by math-verify.

`treepo.rewards.extraction` finds the answer in the response. `treepo.rewards.answer_text` takes typography
and units off both answers. math-verify parses what is left and compares it, down to two numbers, which
`treepo.rewards.answer_numbers` compares. Pairs that math-verify would accept although their notation differs
(a set for a tuple, a list with one element less) are refused here.
docs/rewards.md lists what math-verify does otherwise by itself.

Nothing here bounds time or memory. math-verify's own time-outs use SIGALRM, which a long operation inside one
C function ignores; they are off, and the grading process (treepo.rewards.worker) is killed instead.
"""

import ast
import re
from functools import lru_cache
from itertools import product
from typing import Any

from antlr4 import Token
from latex2sympy2_extended import latex2sympy2
from latex2sympy2_extended.antlr_parser import PSParser
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import grader, parse, verify
from math_verify.parser import LatexExtractionConfig
from sympy import Add, Basic, Eq, Expr, MatrixBase, Mul, Ne, Number, S
from sympy.parsing import sympy_parser

from treepo.rewards.answer_numbers import differ, equal_values
from treepo.rewards.answer_text import AnswerText, read_answer
from treepo.rewards.answer_units import without_letter_unit
from treepo.rewards.extraction import BOXED, extract
from treepo.rewards.grade import Grade, GradeItem
from treepo.verdict import Verdict

# math-verify has no parameter for this. Its own comparison drops everything below 1e-15: 1/2**64 and 1/2**63
# are both 0 to it, alone, in a set, a tuple or an equation.
grader.sympy_numeric_eq = equal_values


class _WholeAnswer(latex2sympy2.PSParser):
    """Its parser without this stops at what it cannot read and returns what is before: 1 for `1 E_{1}`."""

    def math(self) -> PSParser.MathContext:
        tree = super().math()
        end = self.getCurrentToken()
        if end is None or end.type != Token.EOF:
            raise ValueError("the answer goes on after its mathematics")
        return tree


latex2sympy2.PSParser = _WholeAnswer

# sympy reads text by running it as Python, numbers of an answer too.
_eval_expr = sympy_parser.eval_expr


def _eval_atom(code: object, *scope: Any) -> Any:
    """Evaluate text that is one number or name, such as `Float ('0.5' )`, and refuse any other."""
    if not isinstance(code, str):  # compiled, as parse_expr(evaluate=False) does
        raise ValueError("only text is evaluated")
    for part in ast.walk(ast.parse(code.strip(), mode="eval")):
        called = part.func if isinstance(part, ast.Call) else None
        if not isinstance(part, _PARTS) or (called and getattr(called, "id", None) not in _MAKERS):
            raise ValueError(f"neither a number nor a name: {code:.40}")
    return _eval_expr(code, *scope)


_MAKERS = ("Integer", "Float", "Rational", "Symbol", "Function")
_PARTS = (ast.Expression, ast.Call, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd)
sympy_parser.eval_expr = _eval_atom

# Units are off: math-verify would take the m of 6m, a variable, for metres.
_TARGETS = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="all"),
    ),
)
# What sympy and math-verify raise for a pair of values that they have no rule for.
_NO_RULE = (TypeError, ValueError, KeyError, AttributeError, NotImplementedError)
_TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?::[0-5]\d)?")
_CHOICE = re.compile(r"\(?([A-J])\)?|\(?([A-J])\).*|\\text\{\(?([A-J])\)?[.:]?\}.*", re.DOTALL)
_JUXTAPOSED = re.compile(r"(?<![_^\d.])\d+(?:\.\d+)? \d")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_EULER = re.compile(r"(?<![A-Za-z\\])[eE](?= ?_)")  # E_{1} is no power of Euler's number
_BRACKETS = ("()", "(]", "[)", "[]")
_BRACKET_OR_COMMA = re.compile(r"\\[{}]|[()\[\]{},;]")
_LEFT_SIDE = re.compile(r"^[^=<>]*?(?:=|\\in(?![a-z])) ?(?=\(|\[|\\\{)")


def grade_math(response: str, answer: str, extraction: str = BOXED) -> tuple[Verdict, str | None]:
    """Return the verdict (`correct`, `wrong` or `no_answer`) and the text that counts as the answer.

    extraction: as `reward.answer`. Raises what math-verify raises if it fails; a pair that it has no rule for
    is `wrong`.
    """
    found = extract(response, extraction)
    if found is None:
        return Verdict.NO_ANSWER, None
    return (Verdict.CORRECT if equal_answers(answer, found) else Verdict.WRONG), found


def math_grader(item: GradeItem) -> Grade:
    """Grade one item; the pool adds the reward of the verdict."""
    verdict, answer_text = grade_math(item.response, item.answer, item.extraction or BOXED)
    return Grade(None, verdict, answer_text)


def equal_answers(gold: str, other: str) -> bool:
    """Whether two answers are mathematically equal. Not symmetric: the form of `gold` decides the rules."""
    if gold.strip() == other.strip():
        return True
    first, second = _read(gold), _read(other)
    if first.unit and second.unit and first.unit != second.unit:
        return False
    if first.key == second.key:
        return bool(first.key)
    if (choice := re.fullmatch(r"\(?([A-J])\)?", first.key)) is not None:
        found = _CHOICE.fullmatch(second.value)
        return found is not None and choice[1] == (found[1] or found[2] or found[3])
    if _is_text(first) or _is_text(second):
        return _words(first.value) == _words(second.value) != ""
    if not re.search(r"(?<!\\)[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", first.value)):
        second = AnswerText(without_letter_unit(second.value) or second.value)
    value = _same_notation(first.value, second.value)
    return value is not None and _equal_forms(value, second.value)


@lru_cache(maxsize=64)
def _read(answer: str) -> AnswerText:
    return read_answer(answer)


def _is_text(answer: AnswerText) -> bool:
    r"""Whether an answer is compared as text: words, a time of day, "1, 2, \ldots, n", digits side by side.

    math-verify multiplies the letters of a word, divides 12:00, drops dots and adds 12 and 34 in "12 34".
    """
    value = answer.value
    if r"\ldots" in value or _JUXTAPOSED.search(value):
        return True
    if (time := _TIME.fullmatch(value)) is not None:
        hours, minutes = int(time[1]), int(time[2])
        return (
            time[2][0] == "0" or hours == 0 or minutes % hours == 0 or "::" in value or value.count(":") > 1
        )
    if r"\text" in value and not re.search(r"[\d=<>^_\\]", value.replace(r"\text", "")):
        return True
    return bool(re.fullmatch(r"(?=.*[A-Za-z]{4}|(?i:yes|no|odd)$)[A-Za-z][A-Za-z' -]*", value))


def _words(value: str) -> str:
    words = re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", value)
    return re.sub(r"(?<![a-z0-9]) +| +(?![a-z0-9])|[.,]+ *$", "", " ".join(words.casefold().split()))


def _same_notation(gold: str, other: str) -> str | None:
    """`gold` as it is compared with `other`; None if their brackets or numbers of elements contradict."""
    kind, size = _notation(gold)
    other_kind, other_size = _notation(other)
    bracketed, other_bracketed = kind in _BRACKETS, other_kind in _BRACKETS
    if {kind, other_kind} & {"list", "set"} and size != other_size and r"\pm" not in gold + other:
        return None
    if (kind == "set" and other_bracketed) or (bracketed and other_kind == "set"):
        return None
    if bracketed and other_bracketed and size == other_size == 2 and kind != other_kind:
        return None  # a closed interval and an open one; [1, 2, 3] and (1, 2, 3) differ in taste only
    return f"({gold})" if kind == "list" and other_bracketed else gold  # then the order counts


@lru_cache(maxsize=64)
def _notation(value: str) -> tuple[str, int]:
    r"""How values are written and how many they are: ("set", 2) for `\{1, 2\}`, ("[)", 2) for `[1, 2)`,
    ("list", 2) for `1, 2`, ("", 1) for anything else.
    """
    value = _LEFT_SIDE.sub("", value, count=1)
    depth, commas, first_end = 0, {0: 0, 1: 0}, 0
    for mark in _BRACKET_OR_COMMA.finditer(value):
        depth += mark[0] in ("(", "[", "{", r"\{")
        depth -= mark[0] in (")", "]", "}", r"\}")
        if mark[0] in ",;" and depth in commas:
            commas[depth] += 1
        elif depth == 0 and not first_end:
            first_end = mark.end()
    if value.startswith(("(", "[", r"\{")) and first_end == len(value) and (commas[1] or value[0] == "\\"):
        return ("set" if value[0] == "\\" else value[0] + value[-1]), commas[1] + 1
    return ("list" if commas[0] else ""), commas[0] + 1


def _equal_forms(gold: str, other: str) -> bool:
    gold, other = _distinct_cases(gold, other)
    return any(_equal_pair(*pair) for pair in product(_forms(gold), _forms(other)))


def _distinct_cases(gold: str, other: str) -> tuple[str, str]:
    """Rename capitals if `gold` has both N and n: math-verify makes one variable of them."""
    letters = set(_LETTER.findall(gold))
    both = sorted(letter for letter in letters if letter.isupper() and letter.lower() in letters)
    names = dict(zip(both, (r"\Xi ", r"\Upsilon ", r"\Gamma ", r"\Lambda "), strict=False))
    first, second = (_LETTER.sub(lambda found: names.get(found[0], found[0]), text) for text in (gold, other))
    return first, second


@lru_cache(maxsize=64)
def _forms(value: str) -> tuple[Basic | MatrixBase | str, ...]:
    """The comparable forms of a value: what sympy can express, and its text."""
    value = _EULER.sub(r"\\varepsilon", value)
    forms = parse(rf"\boxed{{{value}}}", _TARGETS, parsing_timeout=0, raise_on_error=True)
    return tuple(form for form in forms if not _undefined(form))


def _undefined(form: object) -> bool:
    return isinstance(form, Basic) and form.has(S.NaN, S.ComplexInfinity)


def _equal_pair(gold: Any, other: Any) -> bool:
    if isinstance(gold, Ne) or isinstance(other, Ne):  # math-verify has no rule for these
        return type(gold) is type(other) and {gold.lhs, gold.rhs} == {other.lhs, other.rhs}
    if isinstance(other, Eq) and (_says_nothing(other) or (not isinstance(gold, Eq) and _is_unsolved(other))):
        return False
    try:
        return not differ(gold, other) and verify(
            gold, other, allow_set_relation_comp=True, timeout_seconds=0, raise_on_error=True
        )
    except _NO_RULE:
        return False


def _says_nothing(equation: Any) -> bool:
    """Whether it is like x = x + 1: to math-verify, all equations without a solution are the same."""
    left, right = equation.lhs, equation.rhs
    if not (isinstance(left, Expr) and isinstance(right, Expr) and left.free_symbols and right.free_symbols):
        return False
    return bool(Add(left, Mul(-1, right)).is_number)


def _is_unsolved(equation: Any) -> bool:
    """Whether it is like x^2 = 5 or 2x = 5, whose right side math-verify takes for the value of x."""
    left = equation.lhs
    polynomial = len(left.free_symbols) == 1 and not left.is_Symbol and left.is_polynomial()
    return polynomial and isinstance(equation.rhs, Number)
