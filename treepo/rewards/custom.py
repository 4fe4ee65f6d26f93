"""The user's own reward function, named `module:function` in the configuration.

It is called as f(prompt, response, answer, extra): strings, and the row's extra column as a dict. It
returns the reward as a number, or a dict of numbers with the reward under `reward`. A boolean `correct` in
the dict is the verdict; without it, a response is correct if its reward is above 0. All other numbers are
logged under their names.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping

from treepo.rewards.grade import Grade, GradeItem
from treepo.tree import Verdict

RewardFunction = Callable[[str, str, str, Mapping[str, object]], object]


def load_function(name: str) -> RewardFunction:
    """Import `module:function`, from the working directory too."""
    module_name, function_name = name.split(":")
    sys.path.append(os.getcwd())
    function = getattr(importlib.import_module(module_name), function_name)
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, not a function")
    return function


def call(function: RewardFunction, item: GradeItem) -> Grade:
    """Grade `item` with the function. Raises ValueError if its result is no reward."""
    return grade_of(function(item.prompt, item.response, item.answer, item.extra))


def grade_of(result: object) -> Grade:
    """Make a grade of a number or a dict of numbers. Raises ValueError for anything else."""
    numbers = result if isinstance(result, Mapping) else {"reward": result}
    if "reward" not in numbers:
        raise ValueError(f'the dict that it returned has no "reward", only {sorted(map(str, numbers))}')
    terms = {str(name): _number(name, value) for name, value in numbers.items()}
    reward = terms.pop("reward")
    correct = bool(terms.pop("correct", reward > 0))
    return Grade(reward, Verdict.CORRECT if correct else Verdict.WRONG, terms=terms)


def _number(name: object, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars convert too
    except (TypeError, OverflowError) as error:
        raise ValueError(f"it returned {name} = {value!r:.60}, which is no number") from error
    if not math.isfinite(number):
        raise ValueError(f"it returned {name} = {number}, which is not finite")
    return number
