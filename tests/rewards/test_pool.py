"""The reward pool: whatever a response does to its grader, the others get their grades in order."""

import asyncio
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT
from treepo.config.reward import RewardConfig
from treepo.errors import ConfigError, RewardError
from treepo.rewards.grade import Grade, GradeItem
from treepo.rewards.pool import RewardPool
from treepo.tree import Verdict

OBEY = "tests.support.reward_functions:obey"
DEADLINE_SECONDS = 3.0
PATIENCE_SECONDS = 60.0  # the longest wait for an event that must happen, and happens sooner


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the event did not happen"
        time.sleep(0.02)


def grades(pool: RewardPool, *responses: str, answer: str = "1") -> list[Grade]:
    return asyncio.run(pool.grade([GradeItem(response, answer) for response in responses]))


@pytest.fixture(scope="module")
def obeying_pool() -> Iterator[RewardPool]:
    config = RewardConfig(function=OBEY, workers=2, deadline_seconds=60, memory_mb=256)
    with RewardPool(config) as pool:
        yield pool


@pytest.fixture(scope="module")
def impatient_pool() -> Iterator[RewardPool]:
    """Its deadline is one that only a stuck process misses: what it must grade takes milliseconds."""
    with RewardPool(RewardConfig(function=OBEY, workers=2, deadline_seconds=DEADLINE_SECONDS)) as pool:
        yield pool


def test_verdicts_and_rewards_follow_the_configuration(math_pool: RewardPool) -> None:
    right, wrong, none = grades(math_pool, r"so \boxed{\frac{2}{2}}", r"\boxed{2}", "it is 1")
    assert right == Grade(2.0, Verdict.CORRECT, r"\frac{2}{2}")
    assert wrong == Grade(-0.5, Verdict.WRONG, "2")
    assert none == Grade(-0.5, Verdict.NO_ANSWER)


def test_many_callers_get_their_own_grades_in_order(math_pool: RewardPool) -> None:
    async def one_caller(first: int) -> None:
        items = [GradeItem(rf"\boxed{{{first + i}}}", str(first + i // 2 * 2)) for i in range(10)]
        result = await math_pool.grade(items)
        assert [grade.answer_text for grade in result] == [str(first + i) for i in range(10)]
        assert [grade.verdict for grade in result] == [Verdict.CORRECT, Verdict.WRONG] * 5

    async def all_callers() -> None:
        await asyncio.gather(*(one_caller(100 * caller) for caller in range(8)))

    asyncio.run(all_callers())


def test_nothing_to_grade(math_pool: RewardPool) -> None:
    assert grades(math_pool) == []


def test_a_cancelled_caller_leaves_the_pool_usable(obeying_pool: RewardPool) -> None:
    async def cancel_midway() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(obeying_pool.grade([GradeItem("sleep 0.5", "")] * 6), timeout=0.1)

    asyncio.run(cancel_midway())
    assert grades(obeying_pool, "reward 0.5")[0].reward == 0.5


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("allocate 1000000000", "MemoryError"),
        ("raise my mistake", "LookupError: my mistake"),
        ("exit", "SystemExit: 3"),
        ("crash", "exit code 3"),
        ("segfault", "SIGSEGV"),
        ("reward nan", "not finite"),
        ("text 1.0", "reward = '1.0', which is text"),
        ("no_reward", 'a dict without "reward", only'),
        ("end 0", "exit code 0"),
        ("write_to_pipe garbage", "sent no reply"),
        ("write_to_pipe code", "sent no reply: os.system is no part of a message"),
    ],
)
def test_a_response_that_cannot_be_graded_has_no_reward_and_disturbs_no_neighbour(
    obeying_pool: RewardPool, response: str, said: str
) -> None:
    before, bad, after = grades(obeying_pool, "reward 0.25", response, "reward 0.75")
    assert (before.reward, after.reward) == (0.25, 0.75)
    assert (bad.reward, bad.verdict) == (None, Verdict.ERROR)
    assert said in (bad.message or "")


def test_a_missed_deadline_kills_what_the_function_started(
    impatient_pool: RewardPool, tmp_path: Path
) -> None:
    before, bad, after = grades(impatient_pool, "reward 0.25", f"spawn {tmp_path / 'pid'}", "reward 0.75")
    assert (before.reward, after.reward) == (0.25, 0.75)
    message = f"reward.function = {OBEY}: not graded within {DEADLINE_SECONDS:g} s"
    assert bad == Grade(None, Verdict.TIMEOUT, message=message)
    child = int((tmp_path / "pid").read_text())
    wait_until(lambda: not alive(child))


@pytest.mark.parametrize("response", ["write_to_pipe huge", "write_to_pipe flood", "signal SIGSTOP"])
def test_what_never_ends_is_a_timeout_and_disturbs_no_neighbour(
    impatient_pool: RewardPool, response: str
) -> None:
    before, bad, after = grades(impatient_pool, "reward 0.25", response, "reward 0.75")
    assert (before.reward, after.reward) == (0.25, 0.75)
    assert (bad.reward, bad.verdict) == (None, Verdict.TIMEOUT)


def test_a_stopped_keeper_ends_too() -> None:
    config = RewardConfig(function=OBEY, workers=1, deadline_seconds=DEADLINE_SECONDS)
    with RewardPool(config) as pool:
        asyncio.run(pool.ready())
        (keeper,) = pool.worker_pids()
        os.kill(keeper, signal.SIGSTOP)
        assert grades(pool, "sleep 600")[0].verdict is Verdict.TIMEOUT
        assert grades(pool, "reward 0.5")[0].reward == 0.5
        assert not alive(keeper)


def test_a_worker_that_leaks_descriptors_is_replaced() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    number = min(limit * 2 // 3, 20_000)
    config = RewardConfig(function=OBEY, workers=1, deadline_seconds=60)
    with RewardPool(config) as pool:
        result = grades(pool, *[f"leak_descriptors {number}"] * 4)
        assert [grade.reward for grade in result] == [1.0] * 4
        if number > limit // 2:
            assert pool.restarts >= 3


def test_a_worker_that_has_grown_is_replaced_before_it_fails(obeying_pool: RewardPool) -> None:
    restarts = obeying_pool.restarts
    result = grades(obeying_pool, *["hoard 150000000"] * 4)
    assert [grade.reward for grade in result] == [1.0] * 4
    assert obeying_pool.restarts >= restarts + 3  # the last replacement may still be under way


@pytest.mark.parametrize("killed", ["keeper", "grading process"])
def test_workers_killed_from_outside_are_replaced_and_lose_no_item(killed: str) -> None:
    config = RewardConfig(function=OBEY, workers=2, deadline_seconds=30)
    with RewardPool(config) as pool:
        asyncio.run(pool.ready())
        keepers = pool.worker_pids()
        graders = [child.pid for keeper in keepers for child in psutil.Process(keeper).children()]
        assert len(graders) == 2
        for pid in keepers if killed == "keeper" else graders:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, keepers + graders)))
        assert [grade.reward for grade in grades(pool, *["reward 1"] * 8)] == [1.0] * 8
        assert pool.restarts >= 1
        assert set(pool.worker_pids()) != set(keepers)


def test_starting_does_not_count_against_the_deadline() -> None:
    # slow_to_import takes 2.5 s. On a loaded machine a grade may take a second.
    config = RewardConfig(function="tests.support.slow_to_import:nap_if_asked", workers=1, deadline_seconds=2)
    with RewardPool(config) as pool:
        first, second, third = grades(pool, "go on", "nap", "go on")
    assert (first.reward, second.verdict, third.reward) == (1.0, Verdict.TIMEOUT, 1.0)


def test_a_caller_that_stops_waiting_for_the_start_does_not_stop_it() -> None:
    config = RewardConfig(function=OBEY, workers=1, deadline_seconds=30)

    async def give_up_and_grade(pool: RewardPool) -> list[Grade]:
        waiting = asyncio.create_task(pool.ready())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        return await pool.grade([GradeItem("reward 1", "")])

    with RewardPool(config) as pool:
        assert asyncio.run(give_up_and_grade(pool))[0].reward == 1.0


def test_own_function_sees_everything_and_its_terms_come_back() -> None:
    item = GradeItem("the answer is 42", "42", prompt="what?", extra={"bonus": 0.5})
    with RewardPool(
        RewardConfig(function="tests.support.reward_functions:length_and_match", workers=1)
    ) as pool:
        right, wrong = asyncio.run(pool.grade([item, GradeItem("", "42")]))
    assert (right.reward, right.verdict) == (1.0, Verdict.CORRECT)
    assert right.terms == {"prompt_length": 5, "response_length": 16, "bonus": 0.5}
    assert (wrong.reward, wrong.verdict) == (0.0, Verdict.WRONG)


def test_traceback_is_shown_once(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.ERROR),
        RewardPool(RewardConfig(function=OBEY, workers=1)) as pool,
    ):
        grades(pool, *["raise my mistake"] * 5)
    shown = [record.getMessage() for record in caplog.records if "my mistake" in record.getMessage()]
    assert len(shown) == 1
    frames = [line for line in shown[0].splitlines() if line.lstrip().startswith("File ")]
    assert frames
    assert all("reward_functions.py" in frame for frame in frames), "only the author's own"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_module:f", "ModuleNotFoundError"),
        ("tests.support.reward_functions:no_such_function", "AttributeError"),
        ("tests.support.reward_functions:PATIENCE", "AttributeError"),
        ("os:sep", "not a function"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_configuration_error(function: str, said: str) -> None:
    with RewardPool(RewardConfig(function=function, workers=1)) as pool:
        for wait in (pool.ready, lambda: pool.grade([GradeItem("", "")])):
            with pytest.raises(ConfigError, match=f"reward.function = {function}.*{said}"):
                asyncio.run(wait())


def test_close_leaves_no_process_and_fails_waiting_callers() -> None:
    pool = RewardPool(RewardConfig(function=OBEY, workers=2, deadline_seconds=600))

    async def close_midway() -> None:
        await pool.ready()
        waiting = asyncio.create_task(pool.grade([GradeItem("sleep 600", "")] * 5))
        await asyncio.sleep(0.2)
        pids = pool.worker_pids()
        assert len(pids) == 2
        await asyncio.to_thread(pool.close)
        assert not any(map(alive, pids))
        with pytest.raises(RewardError, match="closed"):
            await waiting
        with pytest.raises(RewardError, match="closed"):
            await pool.grade([GradeItem("reward 1", "")])

    asyncio.run(close_midway())
    pool.close()  # again does nothing


def test_close_during_the_start() -> None:
    pool = RewardPool(RewardConfig(workers=2))
    wait_until(lambda: len(pool.worker_pids()) == 2)
    pids = pool.worker_pids()
    pool.close()
    assert not any(map(alive, pids))


_PARENT = """
import asyncio, sys
from treepo.config.reward import RewardConfig
from treepo.rewards.grade import GradeItem
from treepo.rewards.pool import RewardPool

async def main():
    function = "tests.support.reward_functions:obey"
    pool = RewardPool(RewardConfig(function=function, workers=2, deadline_seconds=600))
    await pool.ready()
    grading = asyncio.create_task(pool.grade([GradeItem("sleep 600", "")]))
    await asyncio.sleep(0.2)
    print(*pool.worker_pids(), flush=True)
    await grading

asyncio.run(main())
"""


def test_workers_die_with_their_parent_idle_or_busy() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    wait_until(lambda: not any(map(alive, pids)))


_ELSEWHERE = """
import asyncio, os, sys
from treepo.config.reward import RewardConfig
from treepo.rewards.grade import GradeItem
from treepo.rewards.pool import RewardPool

for folder in sys.argv[1:]:
    os.chdir(folder)
    with RewardPool(RewardConfig(function="where:in_copy", workers=1)) as pool:
        print(asyncio.run(pool.grade([GradeItem("", "")]))[0].reward)
"""


def test_workers_import_the_package_that_their_parent_runs(tmp_path: Path) -> None:
    """From its sources in the working directory, also after the parent has changed to another directory."""
    sources, elsewhere = tmp_path / "sources", tmp_path / "elsewhere"
    for folder in (sources, elsewhere):
        folder.mkdir()
        (folder / "where.py").write_text(
            f"import treepo\ndef in_copy(*_): return {str(sources)!r} in treepo.__path__[0]\n"
        )
    (sources / "treepo").symlink_to(ROOT / "treepo")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, sources, elsewhere],
        capture_output=True,
        text=True,
        cwd=sources,
        env=environment,
        check=True,
    )
    assert done.stdout == "1.0\n1.0\n"


def test_what_a_function_prints_stays_out_of_the_parents_output(capfd: pytest.CaptureFixture[str]) -> None:
    with RewardPool(RewardConfig(function=OBEY, workers=1)) as pool:
        grades(pool, "print loud")
    output, errors = capfd.readouterr()
    assert "loud" not in output
    assert "loud" in errors
