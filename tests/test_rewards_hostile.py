"""Whatever a model writes ends in a verdict in time, and a neighbour's grade is right."""

import asyncio
import time

import pytest
from hostile import HOSTILE
from treepo.config.reward import RewardConfig
from treepo.rewards.grade import Grade, GradeItem
from treepo.rewards.pool import RewardPool
from treepo.tree import Verdict

GOLD = "5"
NEIGHBOURS = [
    (GradeItem(r"thus \boxed{\frac{10}{4}}", "2.5"), Verdict.CORRECT),
    (GradeItem(r"thus \boxed{(1,2)}", "(2,1)"), Verdict.WRONG),
    (GradeItem("thus nothing", "1"), Verdict.NO_ANSWER),
]
# Equal to the gold answer, mathematically or once what cannot be seen is taken away.
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


def grade_among_neighbours(names: list[str], config: RewardConfig) -> tuple[dict[str, Grade], float]:
    """The grades by name, and the longest time in seconds that one of them took on one worker."""
    longest = 0.0

    async def grade_one(pool: RewardPool, slots: asyncio.Semaphore, name: str) -> Grade:
        nonlocal longest
        async with slots:  # as many at a time as there are workers: time in the queue is not grading time
            start = time.perf_counter()
            grade, *neighbours = await pool.grade(
                [GradeItem(HOSTILE[name], GOLD), *(item for item, _ in NEIGHBOURS)]
            )
            longest = max(longest, time.perf_counter() - start)
        assert [neighbour.verdict for neighbour in neighbours] == [verdict for _, verdict in NEIGHBOURS], name
        return grade

    async def grade_all() -> list[Grade]:
        with RewardPool(config) as pool:
            await pool.ready()
            slots = asyncio.Semaphore(config.workers)
            return await asyncio.gather(*(grade_one(pool, slots, name) for name in names))

    return dict(zip(names, asyncio.run(grade_all()), strict=True)), longest


def check(grades: dict[str, Grade]) -> None:
    for name, grade in grades.items():
        assert grade.verdict is not Verdict.CORRECT or name in MAY_BE_CORRECT, name
        assert (grade.reward is not None) == grade.verdict.graded, name


def test_a_few_hostile_responses() -> None:
    names = ["tower of nines", "1 MB of opening braces", "deep roots", "lone surrogates", "NUL bytes", "code"]
    grades, _ = grade_among_neighbours(names, RewardConfig(workers=2, deadline_seconds=2, memory_mb=512))
    check(grades)
    assert grades["tower of nines"].verdict is Verdict.TIMEOUT
    assert grades["1 MB of opening braces"].verdict is Verdict.NO_ANSWER
    assert grades["deep roots"].verdict in (Verdict.ERROR, Verdict.TIMEOUT)


@pytest.mark.slow
def test_all_hostile_responses() -> None:
    assert len(HOSTILE) >= 60
    config = RewardConfig(workers=2, deadline_seconds=3, memory_mb=1024)
    grades, longest = grade_among_neighbours(list(HOSTILE), config)
    check(grades)
    # One deadline for it, at worst one more for the replacement of each worker and the three neighbours.
    assert longest < 4 * config.deadline_seconds
