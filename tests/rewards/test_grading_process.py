"""Grading processes whose reward function forks, crashes, hangs or detaches: no grade is lost, late or
another response's, and nothing that the function started outlives it.
"""

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rewards.test_pool import alive, grades, wait_until
from tests.support.paths import ROOT
from treepo.config.reward import RewardConfig
from treepo.errors import RewardError
from treepo.rewards.grade import GradeItem, Reply
from treepo.rewards.pool import RewardPool
from treepo.rewards.process import Worker, WorkerDied
from treepo.tree import Verdict

OBEY = "tests.support.reward_functions:obey"
BETWEEN = 0.3125
PATIENCE_SECONDS = 120.0  # for what happens at once, on a machine under any load


@pytest.fixture(scope="module")
def patient_pool() -> Iterator[RewardPool]:
    """One worker, so that a reply too many would meet the next response; no deadline is met."""
    with RewardPool(RewardConfig(function=OBEY, workers=1, deadline_seconds=600, memory_mb=1024)) as pool:
        yield pool


def rewards(pool: RewardPool, responses: list[str]) -> list[float | None]:
    async def grade() -> list[float | None]:
        items = [GradeItem(response, "") for response in responses]
        found = await asyncio.wait_for(pool.grade(items), PATIENCE_SECONDS)
        return [one.reward for one in found]

    return asyncio.run(grade())


RETURNS = [
    "reward {}",
    "fork return {}",
    "fork raise {}",
    "fork sys.exit {}",
    "fork os._exit {}",
    "fork_in_a_thread {}",
    "map {}",
    "change_surroundings {}",
]
RAISES = ["raise in the parent", "cancel", "no_reward"]
CRASHES = ["crash", "signal_group SIGTERM"]


def test_grades_do_not_shift_whatever_the_function_does(patient_pool: RewardPool) -> None:
    responses, expected = [], []
    drawn = random.Random(0)
    kinds = drawn.sample(RETURNS * 5 + RAISES * 3 + CRASHES, k=5 * len(RETURNS) + 3 * len(RAISES) + 2)
    for number, kind in enumerate(kinds):
        responses.append(kind.format(number / 64))
        expected.append(number / 64 if kind in RETURNS else None)
    assert rewards(patient_pool, responses) == expected


@pytest.mark.parametrize("kind", ["attached", "detached"])
def test_a_crash_is_seen_at_once_and_ends_what_the_function_left(
    patient_pool: RewardPool, tmp_path: Path, kind: str
) -> None:
    """The item is tried twice; each time a child holds what it has inherited."""
    left = tmp_path / "pid"
    assert rewards(patient_pool, [f"leave {kind} crash {left}", f"reward {BETWEEN}"]) == [None, BETWEEN]
    wait_until(lambda: not alive(int(left.read_text())))


def test_closing_ends_what_a_hanging_function_left(tmp_path: Path) -> None:
    """As a missed deadline does, at a moment that does not depend on the machine."""
    left = [tmp_path / "attached", tmp_path / "detached"]

    async def close_midway(pool: RewardPool) -> None:
        items = [GradeItem(f"leave {path.name} hang {path}", "") for path in left]
        waiting = asyncio.create_task(pool.grade(items))
        await asyncio.to_thread(wait_until, lambda: all(path.exists() for path in left))
        await asyncio.to_thread(pool.close)
        with pytest.raises(RewardError, match="closed"):
            await waiting

    with RewardPool(RewardConfig(function=OBEY, workers=2, deadline_seconds=600)) as pool:
        asyncio.run(close_midway(pool))
    assert not any(alive(int(path.read_text())) for path in left)


def test_what_is_left_by_a_function_that_returned_ends_with_the_pool(tmp_path: Path) -> None:
    left = [tmp_path / "attached", tmp_path / "detached"]
    with RewardPool(RewardConfig(function=OBEY, workers=1, deadline_seconds=600)) as pool:
        assert rewards(pool, [f"leave {path.name} return {path}" for path in left]) == [1.0, 1.0]
        pids = [int(path.read_text()) for path in left]
        assert all(map(alive, pids))  # a helper may serve many responses
    assert not any(map(alive, pids))


_PARENT = f"""
import asyncio, sys
from treepo.config.reward import RewardConfig
from treepo.rewards.grade import GradeItem
from treepo.rewards.pool import RewardPool

pool = RewardPool(RewardConfig(function={OBEY!r}, workers=1, deadline_seconds=600))
print(asyncio.run(pool.grade([GradeItem(sys.argv[1], "")]))[0].reward, flush=True)
sys.stdin.read()
"""


def test_what_a_function_left_dies_with_a_killed_parent(tmp_path: Path) -> None:
    left = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, f"leave detached return {left}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "1.0\n"
        pid = int(left.read_text())
        assert alive(pid)
        parent.kill()
    wait_until(lambda: not alive(pid))


def test_a_process_that_no_longer_answers_is_a_timeout() -> None:
    with RewardPool(RewardConfig(function=OBEY, workers=2, deadline_seconds=0.5)) as pool:
        executed, stopped = grades(pool, "execute sleep 600", "signal SIGSTOP")
    assert (executed.verdict, stopped.verdict) == (Verdict.TIMEOUT, Verdict.TIMEOUT)


def test_a_closed_pipe_is_said_and_nothing_is_written_into_the_file_in_its_place(
    patient_pool: RewardPool, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    bad, after = grades(patient_pool, f"close_descriptors {path}", f"reward {BETWEEN}")
    assert bad.message == f"reward.function = {OBEY}: the function closed the pipe of its grading process"
    assert (bad.verdict, after.reward) == (Verdict.ERROR, BETWEEN)
    assert path.read_bytes() == b""


def test_a_reply_to_another_request_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(RewardConfig(function=OBEY, workers=1))
    try:
        worker.wait_ready()
        reply = worker.grade(GradeItem(f"reward {BETWEEN}", ""), PATIENCE_SECONDS)
        assert (reply.number, reply.grade.reward) == (1, BETWEEN)
        monkeypatch.setattr(worker, "_receive", lambda _: Reply(1, reply.grade))
        with pytest.raises(WorkerDied, match="sent no reply to request 2"):
            worker.grade(GradeItem("reward 1", ""), PATIENCE_SECONDS)
    finally:
        worker.close()
