"""The toy problems: their arithmetic holds, their shape is constant, and careless solutions give up."""

import re

import numpy as np
import pytest

from treepo.rollout import rng
from treepo.toy import problems
from treepo.toy.problems import GIVE_UP, GUESS_RADIUS, STEP_BYTES, STEPS, Problem

_STEP = re.compile(r"(\d\d)([+-]\d)=(\d\d)\n")
_BOX = re.compile(r"\\boxed\{(\d\d)\}\Z")


def _many(number: int = 300) -> list[Problem]:
    return problems.draw_problems(rng.generator("test", number), number)


def _read_prompt(text: str) -> tuple[int, list[int]]:
    """The start and the changes, read from the words of a prompt."""
    start, *clauses = (
        text.removesuffix(" = ?").replace(",", "").replace(" plus ", "|").replace(" less ", "|-").split("|")
    )
    return int(start), [int(clause) for clause in clauses]


def test_the_prompt_says_the_problem() -> None:
    for problem in _many():
        start, changes = _read_prompt(problem.text)
        assert (start, tuple(changes)) == (problem.start, problem.changes)
        assert start + sum(changes) == problem.answer


def test_every_step_of_a_careful_solution_is_true_and_follows_from_the_last() -> None:
    for problem in _many():
        solution = problem.solution()
        steps = _STEP.findall(solution)
        total = problem.start
        for (before, change, after), expected in zip(steps, problem.changes, strict=True):
            assert (int(before), int(change)) == (total, expected)
            total += expected
            assert int(after) == total
        assert _BOX.search(solution).group(1) == str(problem.answer)  # pyright: ignore[reportOptionalMemberAccess]  # a missing box is a failure too
        assert problems.is_correct(problem, solution)


def test_clauses_and_steps_are_equally_long() -> None:
    prompts, solutions = zip(*((p.text, p.solution()) for p in _many()), strict=True)
    assert len({len(prompt) for prompt in prompts}) == 1
    assert {len(step) for s in solutions for step in s.splitlines(keepends=True)[:-1]} == {STEP_BYTES}
    assert {len(clause) + 1 for p in prompts for clause in p.removesuffix(" = ?")[2:].split(",")} == {
        STEP_BYTES
    }


def test_a_demonstration_is_a_true_beginning_and_a_guess_near_the_answer() -> None:
    draws = rng.generator("test", "demonstrations")
    for problem in _many():
        demonstration = problems.demonstrate(problem, draws)
        steps = _STEP.findall(demonstration)
        boxed = demonstration[len(steps) * STEP_BYTES :]
        assert problem.solution().startswith(demonstration.removesuffix(boxed))
        guess = int(_BOX.fullmatch(boxed).group(1))  # pyright: ignore[reportOptionalMemberAccess]  # a missing box is a failure too
        assert abs(guess - problem.answer) <= (GUESS_RADIUS if len(steps) < STEPS else 0)


def test_giving_up_is_equally_likely_before_every_step() -> None:
    draws = rng.generator("test", "give up")
    reached = np.zeros(STEPS)
    gave_up = np.zeros(STEPS)
    for problem in _many(2000):
        done = len(_STEP.findall(problems.demonstrate(problem, draws)))
        reached[: done + 1] += 1
        if done < STEPS:
            gave_up[done] += 1
    # Four standard errors of a binomial fraction: the draws are fixed, so this either holds or does not.
    assert gave_up / reached == pytest.approx(
        GIVE_UP, abs=4 * np.sqrt(GIVE_UP * (1 - GIVE_UP) / reached.min())
    )


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        (r"\boxed{47}", True),
        (r"\boxed{ 47 }", True),
        (r"\boxed{46}\boxed{47}", True),
        (r"\boxed{47}\boxed{46}", False),
        (r"\boxed{47", False),
        ("47", False),
        ("", False),
    ],
)
def test_the_last_box_counts(response: str, correct: bool) -> None:
    assert problems.is_correct(Problem(36, (7, -5, 9)), response) is correct
