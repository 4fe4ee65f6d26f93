"""Reach a number: add or subtract every given number, in an order of one's own, so that the target comes out.

    prompt     36 with 7, with 5, with 2 makes 50
    response   36+7=43
               43-5=38
               38+2=40      wrong: 36+7-5+2 is not 50, but 36+7+5+2 is

Which signs reach the target is only known at the end. Going towards it at every number reaches it in two of
five problems; in the others some number must lead away from it. The response is graded by evaluating its
lines: `reward` is this task's reward function, which the product calls in its grading processes.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from treepo.toy.problems import HIGH, LOW
from treepo.toy.recipe import RECIPE

NUMBERS = 4
TARGET = 50
"""One for all problems: a model of two layers learns to compare with it in a few minutes."""
SLIP = 0.3
"""Chance, at each number, that a demonstration takes a sign at random, not one that still leads there."""

STARTING = replace(RECIPE, steps=450, careful_steps=370)
_LINE = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


@dataclass(frozen=True, slots=True)
class Problem:
    """Reach `target` from `start` with each of `numbers` once."""

    start: int
    numbers: tuple[int, ...]
    target: int

    @property
    def text(self) -> str:
        return f"{self.start}{','.join(f' with {number}' for number in self.numbers)} makes {self.target}"

    def solution(self) -> str:
        return _lines(self, np.zeros(len(self.numbers), int))


def draw_problem(rng: np.random.Generator) -> Problem:
    """Draw a problem that can be solved by totals of two digits."""
    while True:
        numbers = rng.integers(1, 10, NUMBERS)
        totals = TARGET - np.cumsum(numbers * rng.choice((-1, 1), NUMBERS))  # from the last to the first
        if totals.min() >= LOW and totals.max() <= HIGH:
            return Problem(int(totals[-1]), tuple(numbers[::-1].tolist()), TARGET)


def demonstrate(problem: Problem, rng: np.random.Generator) -> str:
    """Draw one demonstration, which slips now and then."""
    return _lines(problem, rng.choice((-1, 1), NUMBERS) * (rng.random(NUMBERS) < SLIP))


def reachable(total: int, numbers: Sequence[int]) -> frozenset[int]:
    """The totals that adding or subtracting all `numbers` in turn can end in, by totals of two digits."""
    ends = {total} if LOW <= total <= HIGH else set[int]()
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


def _lines(problem: Problem, slips: np.ndarray) -> str:
    """Write a response. slips: -1 or 1 where it takes this sign, 0 where it takes one that leads there: away
    from the target only if that cannot be reached from the other side.
    """
    lines, total, target = [], problem.start, problem.target
    for index, number in enumerate(problem.numbers):
        rest = problem.numbers[index + 1 :]
        towards = number if total < target else -number
        away = target in reachable(total - towards, rest) - reachable(total + towards, rest)
        change = -towards if away else towards
        if LOW <= total + slips[index] * number <= HIGH:
            change = int(slips[index]) * number or change
        lines.append(f"{total}{change:+d}={total + change}\n")
        total += change
    return "".join(lines)
