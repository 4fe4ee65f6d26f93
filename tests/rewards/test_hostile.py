"""Whatever a model writes gets a verdict in time, and its neighbours' grades are right."""

import asyncio

import pytest

from tests.support.hostile import HOSTILE
from treepo.config.reward import RewardConfig
from treepo.rewards.grade import Grade, GradeItem
from treepo.rewards.pool import RewardPool
from treepo.tree import Verdict

GOLD = "5"
PATIENCE_SECONDS = 600.0  # the longest wait for one verdict; all of them together take a fifth of it
NEIGHBOURS = [
    (GradeItem(r"thus \boxed{\frac{10}{4}}", "2.5"), Verdict.CORRECT),
    (GradeItem(r"thus \boxed{(1,2)}", "(2,1)"), Verdict.WRONG),
    (GradeItem("thus nothing", "1"), Verdict.NO_ANSWER),
]
# Equal to the gold answer mathematically, or without their invisible characters.
MAY_BE_CORRECT = {
    "1 MB of balanced braces",
    "100k boxes",
    "NUL bytes",
    "combining marks",
    "deep absolute values",
    "deep boxes",
    "deep brackets",
    "deep parentheses",
    "endless zeros",
    "percent of percent",
    "right-to-left marks",
    "spaces",
    "units",
}


def grade_among_neighbours(names: list[str], config: RewardConfig) -> dict[str, Grade]:
    async def grade_one(pool: RewardPool, name: str) -> Grade:
        items = [GradeItem(HOSTILE[name], GOLD), *(item for item, _ in NEIGHBOURS)]
        grade, *neighbours = await asyncio.wait_for(pool.grade(items), PATIENCE_SECONDS)
        assert [neighbour.verdict for neighbour in neighbours] == [verdict for _, verdict in NEIGHBOURS], name
        return grade

    async def grade_all() -> list[Grade]:
        with RewardPool(config) as pool:
            return await asyncio.gather(*(grade_one(pool, name) for name in names))

    return dict(zip(names, asyncio.run(grade_all()), strict=True))


def check(grades: dict[str, Grade]) -> None:
    for name, grade in grades.items():
        assert grade.verdict is not Verdict.CORRECT or name in MAY_BE_CORRECT, name
        assert (grade.reward is not None) == grade.verdict.graded, name


def test_a_few_hostile_responses() -> None:
    names = ["tower of nines", "1 MB of opening braces", "deep roots", "lone surrogates", "NUL bytes", "code"]
    grades = grade_among_neighbours(names, RewardConfig(workers=2, deadline_seconds=4, memory_mb=512))
    check(grades)
    assert grades["tower of nines"].verdict is Verdict.TIMEOUT
    assert grades["1 MB of opening braces"].verdict is Verdict.NO_ANSWER
    assert grades["deep roots"].verdict in (Verdict.ERROR, Verdict.TIMEOUT)


@pytest.mark.slow
def test_all_hostile_responses() -> None:
    assert len(HOSTILE) >= 60
    check(grade_among_neighbours(list(HOSTILE), RewardConfig(workers=2, deadline_seconds=4, memory_mb=1024)))
