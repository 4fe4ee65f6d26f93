"""Reach a number: add or subtract every given number, in an order of one's own, so that the target comes out.

    prompt     36 with 7, with 5, with 9 makes 33
    response   36+7=43
               43-5=38
               38-9=29      wrong: 36+7-5-9 is not 33, but 36-7-5+9 is

Which signs reach the target is only known at the end, and an early sign leaves few of the later ones: most
first lines can still be completed, most first halves cannot. The response is graded by evaluating its lines:
`reward` is this task's reward function, in the product's grading processes.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from treepo.toy.problems import HIGH, LOW
from treepo.toy.recipe import RECIPE

NUMBERS = 5
SLIP = 0.2
"""Chance, at each number, that a demonstration takes a sign at random, not one that still leads there."""

STARTING = replace(RECIPE, steps=500, careful_steps=350)
_LINE = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


@dataclass(frozen=True, slots=True)
class Problem:
    """Reach `target` from `start` with each of `numbers` once. `signs`: one way, not part of the problem."""

    start: int
    numbers: tuple[int, ...]
    target: int
    signs: tuple[int, ...] = field(default=(), compare=False)

    @property
    def text(self) -> str:
        return f"{self.start}{','.join(f' with {number}' for number in self.numbers)} makes {self.target}"

    def solution(self) -> str:
        return _lines(self.start, self.numbers, self.signs)


def draw_problem(rng: np.random.Generator) -> Problem:
    """Draw a problem that can be solved by totals of two digits."""
    while True:
        start = int(rng.integers(LOW, HIGH + 1))
        numbers = rng.integers(1, 10, NUMBERS)
        signs = rng.choice((-1, 1), NUMBERS)
        totals = start + np.cumsum(numbers * signs)
        if totals.min() >= LOW and totals.max() <= HIGH:
            return Problem(start, tuple(numbers.tolist()), int(totals[-1]), tuple(signs.tolist()))


def demonstrate(problem: Problem, rng: np.random.Generator) -> str:
    """Draw one demonstration. It takes signs from which the target can be reached, except by a slip; once it
    cannot, it takes any.
    """
    signs: list[int] = []
    total = problem.start
    for index, number in enumerate(problem.numbers):
        allowed = [sign for sign in (-1, 1) if LOW <= total + sign * number <= HIGH]
        rest = problem.numbers[index + 1 :]
        leading = [sign for sign in allowed if problem.target in reachable(total + sign * number, rest)]
        choices = allowed if rng.random() < SLIP or not leading else leading
        signs.append(int(rng.choice(choices)))
        total += signs[-1] * number
    return _lines(problem.start, problem.numbers, signs)


def reachable(total: int, numbers: Sequence[int]) -> frozenset[int]:
    """The totals that adding or subtracting all `numbers` in turn can end in, by totals of two digits."""
    ends = {total}
    for number in numbers:
        ends = {end + change for end in ends for change in (-number, number) if LOW <= end + change <= HIGH}
    return frozenset(ends)


def is_correct(problem: Problem, response: str) -> bool:
    """Whether each line of `response` is true, goes on from the one before, and takes one of the numbers; and
    whether all are taken, and the last line has the target.
    """
    total, taken = problem.start, Counter[int]()
    for line in response.splitlines():
        found = _LINE.fullmatch(line)
        if found is None or int(found[1]) != total:
            return False
        total += int(found[3]) * (1 if found[2] == "+" else -1)
        taken[int(found[3])] += 1
        if int(found[4]) != total:
            return False
    return total == problem.target and taken == Counter(problem.numbers)


def reward(_prompt: str, response: str, answer: str, extra: Mapping[str, object]) -> float:
    """1 for a right response, 0 for any other. extra: the row's start and numbers; answer: the target."""
    start, numbers = extra["start"], extra["numbers"]
    assert isinstance(start, int)
    assert isinstance(numbers, list)
    return float(is_correct(Problem(start, tuple(numbers), int(answer)), response))


def rows(drawn: list[Problem], split: str) -> Iterator[dict[str, object]]:
    """Write the problems as rows in the columns of m-a-p/TreePO_data."""
    for index, problem in enumerate(drawn):
        yield {
            "data_source": f"search.{split}",
            "prompt": [{"role": "user", "content": problem.text}],
            "ability": "math",
            "reward_model": {"ground_truth": str(problem.target), "style": "rule"},
            "extra_info": {
                "index": index,
                "split": split,
                "start": problem.start,
                "numbers": list(problem.numbers),
            },
        }


def _lines(start: int, numbers: Sequence[int], signs: Sequence[int]) -> str:
    lines, total = [], start
    for number, sign in zip(numbers, signs, strict=True):
        lines.append(f"{total}{sign * number:+d}={total + sign * number}\n")
        total += sign * number
    return "".join(lines)
