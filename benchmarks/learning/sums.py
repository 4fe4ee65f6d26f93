r"""Long sums with slips: the quickstart's problems with `STEPS` steps.

    prompt     36 plus 7, less 5, plus 9, ... = ?
    response   36+7=43
               43-5=39      a slip
               39+9=48
               ...
               \boxed{...}

A solver that slips at a step goes on from the wrong total. Its answer is wrong, unless another slip happens
to undo the first. The chance of a slip is the same at every step: most wrong answers are right for a while,
and a tree that goes on from there may still be right. A response fills 10 segments of 8 tokens, one a step.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from treepo.toy import problems
from treepo.toy.problems import HIGH, LOW, Problem
from treepo.toy.recipe import RECIPE

STEPS = 8
SLIP = 0.12
"""Chance, at each step, that a demonstration slips."""
SLIP_RADIUS = 3
"""A slip is off by at most this much, and never by 0."""

STARTING = replace(RECIPE, steps=320, careful_steps=200)
is_correct = problems.is_correct


def draw_problem(rng: np.random.Generator) -> Problem:
    """Draw a problem all of whose totals have two digits."""
    return problems.draw_problem(rng, STEPS)


def demonstrate(problem: Problem, rng: np.random.Generator) -> str:
    """Draw one demonstration, which slips now and then."""
    lines, total = [], problem.start
    for change in problem.changes:
        result = total + change
        if rng.random() < SLIP:
            result += int(rng.choice((-1, 1)) * rng.integers(1, SLIP_RADIUS + 1))
        result = min(max(result, LOW), HIGH)  # always two digits
        lines.append(f"{total}{change:+d}={result}\n")
        total = result
    return f"{''.join(lines)}\\boxed{{{total}}}"


def rows(drawn: list[Problem], split: str) -> Iterator[dict[str, object]]:
    """Write the problems as rows in the columns of m-a-p/TreePO_data."""
    return (row | {"data_source": f"sums.{split}"} for row in problems.rows(drawn, split))
