"""The user's own reward function, named `module:function` in the configuration.

It is called as f(prompt, response, answer, extra): strings, and the row's extra column as a dict. It
returns the reward, a finite number, or a dict with the reward under `reward`. In the dict, `correct` is the
verdict: true, false, 1 or 0; without it, a response is correct if its reward is above 0. A further number is
logged as a metric and a further text with the sample, by what they are, not by what they look like: "1.0" is
a text. True is the number 1, None stands for no value, and a scalar of numpy or torch for its number or
text. Anything else is an error.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from treepo.errors import one_line
from treepo.rewards.grade import Grade, GradeItem
from treepo.verdict import Verdict

RewardFunction = Callable[[str, str, str, Mapping[str, object]], object]
_ALLOWED = "a number, or a dict with a number under `reward`"


class BadGradeError(ValueError):
    """What a reward function or endpoint returned is no grade; the text says why."""


def load_function(name: str) -> RewardFunction:
    """Import `module:function`, from the working directory too."""
    module_name, function_name = name.split(":")
    sys.path.append(os.getcwd())
    function = getattr(importlib.import_module(module_name), function_name)
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, not a function")
    return function


def call(function: RewardFunction, item: GradeItem) -> Grade:
    """Grade `item` with the function. Raises BadGradeError if its result is no grade."""
    return grade_of(function(item.prompt, item.response, item.answer, item.extra))


def grade_of(result: object) -> Grade:
    """Make a grade of a number, or of a dict of numbers and texts. Raises BadGradeError for anything else."""
    values = result if isinstance(result, Mapping) else {"reward": result}
    fields = {printable(str(name)): value for name, value in values.items()}
    if fields.get("reward") is None:
        what = "reward = None" if "reward" in fields else f'a dict without "reward", only {sorted(fields)}'
        raise BadGradeError(f"it returned {what:.200}; allowed: {_ALLOWED}")
    terms: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in fields.items():
        plain = _plain(value)
        if isinstance(plain, str) and name not in ("reward", "correct"):
            texts[name] = printable(plain)
        elif plain is not None:
            terms[name] = _number(name, plain)
    reward = terms.pop("reward")
    correct = terms.pop("correct", float(reward > 0))
    if correct not in (0, 1):
        raise BadGradeError(f"it returned correct = {correct:g}; allowed: true, false, 1, 0")
    return Grade(reward, Verdict.CORRECT if correct else Verdict.WRONG, terms=terms, texts=texts)


def printable(text: str) -> str:
    """`text` with half surrogate pairs escaped: no file or terminal can hold them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    """The Python value of a scalar of numpy, torch or jax; other values as they are."""
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    return value.item()


def _show(value: object) -> str:
    return one_line(repr(value))[:60]


def _number(name: str, value: Any) -> float:
    allowed = _ALLOWED if name == "reward" else "a number, a text or None"
    if isinstance(value, str | bytes | bytearray):  # float() would read "1.0"
        raise BadGradeError(f"it returned {name} = {_show(value)}, which is text; allowed: a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last is torch's
        raise BadGradeError(
            f"it returned {name} = {_show(value)}, which is no number; allowed: {allowed}"
        ) from error
    if not math.isfinite(number):
        raise BadGradeError(f"it returned {name} = {number}, which is not finite")
    return number
