r"""Chains of two-digit sums, solved carefully or carelessly.

A problem starts from a two-digit number and adds or subtracts one digit `STEPS` times. Every total has two
digits:

    prompt     36 plus 7, less 5, plus 9 = ?
    careful    36+7=43
               43-5=38
               38+9=47
               \boxed{47}
    careless   36+7=43
               \boxed{50}

A careless solver gives up before some step and boxes a guess near the answer, which is right only by luck. It
gives up with the same chance before every step, so every branch of a rollout tree still has something to
decide. A clause of the prompt (" plus 7,") and a step of the solution ("36+7=43" and a line break) are both
`STEP_BYTES` long. So the operand of a step is always at the same distance, which a model of two layers learns
within a minute.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import numpy as np

from treepo.rollout.boxed import last_boxed

STEPS = 5
STEP_BYTES = 8
GIVE_UP = 0.19
"""Chance, before each step, that a demonstration gives up."""
GUESS_RADIUS = 6
"""A guess is uniform within this distance of the answer, the answer included."""

LOW, HIGH = 10, 99
"""Every total is one of these, or between them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """`start`, then `changes`, each from -9 to 9 and not 0."""

    start: int
    changes: tuple[int, ...]

    @property
    def text(self) -> str:
        clauses = [f" {'plus' if change > 0 else 'less'} {abs(change)}" for change in self.changes]
        return f"{self.start}{','.join(clauses)} = ?"

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)

    def solution(self, steps: int | None = None, boxed: int | None = None) -> str:
        """Write the solution: the first `steps` steps (None: all), then `boxed` (None: the answer)."""
        lines, total = [], self.start
        for change in self.changes[:steps]:
            lines.append(f"{total}{change:+d}={total + change}\n")
            total += change
        return f"{''.join(lines)}\\boxed{{{self.answer if boxed is None else boxed}}}"


def draw_problem(rng: np.random.Generator, steps: int = STEPS) -> Problem:
    """Draw a problem of `steps` changes all of whose totals have two digits."""
    while True:
        start = int(rng.integers(LOW, HIGH + 1))
        changes = rng.integers(1, 10, steps) * rng.choice((-1, 1), steps)
        totals = start + np.cumsum(changes)
        if totals.min() >= LOW and totals.max() <= HIGH:
            return Problem(start, tuple(int(change) for change in changes))


def draw_problems[P: Hashable](
    rng: np.random.Generator, number: int, draw: Callable[[np.random.Generator], P] = draw_problem
) -> list[P]:
    """Draw `number` different problems."""
    drawn: dict[P, None] = {}
    while len(drawn) < number:
        drawn[draw(rng)] = None
    return list(drawn)


def demonstrate(problem: Problem, rng: np.random.Generator) -> str:
    """Draw one demonstration: careful to the end, or given up before some step and guessed."""
    gives_up = np.flatnonzero(rng.random(STEPS) < GIVE_UP)
    if gives_up.size == 0:
        return problem.solution()
    guess = problem.answer + int(rng.integers(-GUESS_RADIUS, GUESS_RADIUS + 1))
    return problem.solution(steps=int(gives_up[0]), boxed=min(max(guess, LOW), HIGH))


def is_correct(problem: Problem, response: str) -> bool:
    """Whether the last boxed answer of `response` is the problem's."""
    boxed = last_boxed(response)
    return boxed is not None and boxed.strip() == str(problem.answer)


def rows(problems: list[Problem], split: str) -> Iterator[dict[str, object]]:
    """Write the problems as rows in the columns of m-a-p/TreePO_data."""
    for index, problem in enumerate(problems):
        yield {
            "data_source": f"treepo_toy.{split}",
            "prompt": [{"role": "user", "content": problem.text}],
            "ability": "math",
            "reward_model": {"ground_truth": str(problem.answer), "style": "rule"},
            "extra_info": {"index": index, "split": split},
        }
