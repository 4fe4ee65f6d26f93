"""Count the grades a second of one and more grading processes: math-verify on boxed answers.

Half of the items are right, half wrong, of five kinds (integers, fractions, decimals, expressions,
intervals), after a page of text. One JSON line for each number of workers, medians over interleaved repeats;
the ratio is to the first number. Start-up is not counted, and more workers than cores gain nothing.

On a machine with other work the ratio says little. Then see whether `worker_ms` (the workers' CPU time for
one grade) stays the same, and how many workers `own_ms` (this process's CPU time for one grade) keeps busy.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import psutil

from treepo.config.reward import RewardConfig
from treepo.rewards.grade import GradeItem
from treepo.rewards.pool import RewardPool
from treepo.tree import Verdict

KINDS = (
    ("{a}", "{a}.0"),
    (r"\frac{{{a}}}{{{b}}}", "{a}/{b}"),
    ("0.{a}", r"\frac{{{a}}}{{1000}}"),
    ("(x+{a})^2", "x^2+{twice}x+{square}"),
    (r"[{a}, {a}{b}]", r"\left[{a}, {a}{b}\right]"),
)
PAGE = "We look at each case in turn and find that the sum does not change. " * 40


def draw_items(count: int) -> list[GradeItem]:
    """Every second answer is off by one in a."""
    rng = np.random.default_rng(0)
    items = []
    for index in range(count):
        a, b = (int(number) for number in rng.integers(101, 999, size=2))
        gold, other = KINDS[index % len(KINDS)]
        off = a + index // len(KINDS) % 2
        answer = other.format(a=off, b=b, twice=2 * off, square=off**2)
        items.append(GradeItem(rf"{PAGE}\boxed{{{answer}}}", gold.format(a=a, b=b)))
    return items


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one grade. seconds: by the clock; the others are CPU time."""

    seconds: float
    worker_seconds: float
    own_seconds: float


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of the processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


async def grade_all(pool: RewardPool, items: Sequence[GradeItem]) -> Cost:
    pids = [child.pid for keeper in pool.worker_pids() for child in psutil.Process(keeper).children()]
    start, own_start, worker_start = time.perf_counter(), time.process_time(), cpu_seconds(pids)
    grades = await pool.grade(items)
    seconds, own = time.perf_counter() - start, time.process_time() - own_start
    workers = cpu_seconds(pids) - worker_start
    correct = sum(grade.verdict is Verdict.CORRECT for grade in grades)
    assert correct == sum(index // len(KINDS) % 2 == 0 for index in range(len(items))), correct
    assert pool.restarts == 0
    return Cost(seconds / len(items), workers / len(items), own / len(items))


async def measure(workers: Sequence[int], items: Sequence[GradeItem], repeats: int) -> dict[int, list[Cost]]:
    costs: dict[int, list[Cost]] = {number: [] for number in workers}
    for _ in range(repeats):
        for number in workers:
            with RewardPool(RewardConfig(workers=number, deadline_seconds=60.0)) as pool:
                await pool.ready()
                costs[number].append(await grade_all(pool, items))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--grades", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    costs = asyncio.run(measure(arguments.workers, draw_items(arguments.grades), arguments.repeats))
    first = statistics.median(cost.seconds for cost in costs[arguments.workers[0]])
    for number, measured in costs.items():
        seconds = statistics.median(cost.seconds for cost in measured)
        line = {
            "benchmark": "rewards",
            "workers": number,
            "grades": arguments.grades,
            "repeats": arguments.repeats,
            "grades_per_s": round(1 / seconds),
            f"ratio_to_{arguments.workers[0]}": round(first / seconds, 2),
            "worker_ms": round(1e3 * statistics.median(cost.worker_seconds for cost in measured), 2),
            "own_ms": round(1e3 * statistics.median(cost.own_seconds for cost in measured), 3),
        }
        sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


if __name__ == "__main__":
    main()
