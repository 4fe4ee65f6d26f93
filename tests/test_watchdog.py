"""The watchdog names who waits for whom and since when, and writes a status that tells a dead run."""

import asyncio
import json
import logging
import os
import subprocess
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from tests.support.sampling_policies import sampling as policy
from treepo.data.prompts import Prompt
from treepo.display.status import show_status
from treepo.errors import DataError, EngineError
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.driver import PendingRequest, TreeDriver
from treepo.run_status import read_status
from treepo.watchdog import STATUS, Watchdog, describe, gathered, sampling, waiting

PATIENCE = 100.0


@pytest.fixture
def watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Callable[[Callable[[Watchdog], Coroutine[Any, Any, None]]], list[str]]:
    """Run a coroutine function under a watchdog in virtual time; returns the warnings."""

    def run(work: Callable[[Watchdog], Coroutine[Any, Any, None]]) -> list[str]:
        async def watched() -> None:
            async with Watchdog(tmp_path, PATIENCE, steps=9) as watchdog:
                await work(watchdog)

        with caplog.at_level(logging.WARNING):
            run_virtually(watched())
        return caplog.messages

    return run


def test_a_wait_is_named_again_after_twice_as_long(watch) -> None:
    async def work(watchdog: Watchdog) -> None:
        watchdog.phase("weight sync")
        with waiting("the trainer", "rank 3"):
            await asyncio.sleep(5 * PATIENCE)

    assert watch(work) == [
        f"weight sync: the trainer has waited {seconds} s for rank 3" for seconds in (100, 200, 400)
    ]


def test_a_wait_that_gets_on_is_not_named(watch) -> None:
    done = 0

    async def work(_: Watchdog) -> None:
        nonlocal done
        with waiting("the step", "trees", lambda: done):
            for _step in range(10):
                await asyncio.sleep(0.9 * PATIENCE)
                done += 1
            await asyncio.sleep(1.1 * PATIENCE)

    assert watch(work) == ["start: the step has waited 100 s for trees"]


def test_a_wait_is_compared_with_those_before_it(watch) -> None:
    """A trainer whose every step takes longer than the patience warns once, and again if a step hangs."""

    async def work(_: Watchdog) -> None:
        for seconds in (1.5 * PATIENCE, 2 * PATIENCE, 4 * PATIENCE, 13 * PATIENCE):
            with waiting("the trainer", "rank 0"):
                await asyncio.sleep(seconds)

    assert watch(work) == [f"start: the trainer has waited {seconds} s for rank 0" for seconds in (100, 1200)]


def test_ranks_that_have_not_answered_are_named(watch) -> None:
    async def work(_: Watchdog) -> None:
        seconds = (1, 3 * PATIENCE, 2, 3 * PATIENCE)
        await gathered("the trainer", "rank", [asyncio.sleep(each, each) for each in seconds])

    assert watch(work)[0].endswith("for rank 1, rank 3")


@dataclass
class SilentEngine(FakeEngine):
    name: str = ""
    status: str = "serving"

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        await asyncio.Event().wait()
        return await super().generate(request)


def test_a_stall_names_each_engines_status_and_its_oldest_request(watch) -> None:
    engines = [SilentEngine(name="engine 0"), SilentEngine(name="engine 1", status="down: out of memory")]
    driver = TreeDriver(engines, policy(initial_branching=2), decode, seed=7)
    prompt = Prompt("train:0", prompt_tokens(0), "", "", "")

    async def work(_: Watchdog) -> None:
        async with aclosing(driver.sample([prompt], 0)) as results:
            with sampling(driver, engines):
                tree = asyncio.ensure_future(anext(results))
                await asyncio.sleep(1.1 * PATIENCE)
                driver.idle.pause()  # a pause of sampling is no reason to warn
                await asyncio.sleep(5 * PATIENCE)
                tree.cancel()
                await asyncio.wait((tree,))

    assert watch(work) == [
        "start: sampling has waited 100 s for an answer: engine 0 is serving with 2 unanswered requests, the "
        "oldest 0 s old: request 0 of prompt train:0; engine 1 is down: out of memory with no "
        "unanswered requests"
    ]


def test_of_many_engines_those_with_the_oldest_requests_are_named() -> None:
    engines = [SilentEngine(name=f"engine {index}", status="serving") for index in range(20)]
    pending = [PendingRequest("a", number, number % 20, float(number % 20)) for number in range(60)]
    text = describe(pending, engines)
    assert [name for name in text.split("; ") if "oldest" in name] == [
        f"engine {index} is serving with 3 unanswered requests, the oldest {index} s old: request {index} of "
        "prompt a"
        for index in range(12, 20)
    ]
    assert text.endswith("; 12 other engines have 36 unanswered requests")


def test_the_status_says_what_a_run_does_and_how_it_ended(watch, tmp_path: Path) -> None:
    async def work(watchdog: Watchdog) -> None:
        watchdog.engines = [SilentEngine(name="engine 0", status="down: out of memory")]
        watchdog.phase("train")
        watchdog.step(3, {"reward": 0.25, "accuracy": float("nan")})
        with waiting("the trainer", "rank 3"):
            await asyncio.sleep(0.89 * PATIENCE)
            status = read_status(tmp_path)
        assert (status.state, status.step, status.steps, status.phase) == ("running", 3, 9, "train")
        (wait,) = status.waits
        assert (wait.who, wait.whom, wait.seconds) == ("the trainer", "rank 3", 85.0)
        assert status.engines == {"engine 0": "down: out of memory"}
        assert status.metrics == {"reward": 0.25, "accuracy": None}
        assert not status.fault()
        raise EngineError("engine 0 is gone")

    with pytest.raises(EngineError):
        watch(work)
    assert not list(tmp_path.glob("*.part"))
    status = read_status(tmp_path)
    assert (status.state, status.reason) == ("failed", "engine 0 is gone")
    assert not status.fault()


def test_a_status_that_cannot_be_written_ends_no_run(watch, tmp_path: Path) -> None:
    async def work(_: Watchdog) -> None:
        (tmp_path / STATUS).unlink()
        (tmp_path / STATUS).mkdir()
        await asyncio.sleep(PATIENCE)

    assert watch(work) == []


def _shown(folder: Path) -> str:
    console = Console(record=True, width=500, file=open(os.devnull, "w"))  # noqa: SIM115  the console's
    show_status(console, folder, read_status(folder))
    return console.export_text()


def _changed(folder: Path, **changes: object) -> None:
    status = json.loads((folder / STATUS).read_text())
    (folder / STATUS).write_text(json.dumps(status | {"state": "running"} | changes))


def test_a_run_whose_process_is_gone_or_silent_is_dead(watch, tmp_path: Path) -> None:
    async def work(watchdog: Watchdog) -> None:
        watchdog.phase("sample")
        await asyncio.sleep(1)

    watch(work)
    assert "finished" in _shown(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    _changed(tmp_path)
    assert "running" in _shown(tmp_path)
    _changed(tmp_path, pid=gone.pid)
    assert f"dead or stuck: its process {gone.pid} is gone" in _shown(tmp_path)
    _changed(tmp_path, process_started=1.0)
    assert "is gone" in _shown(tmp_path), "another process has its number"
    _changed(tmp_path, host="elsewhere")
    assert "running" in _shown(tmp_path)
    _changed(tmp_path, host="elsewhere", written=1.0)
    assert "last sign of life is" in _shown(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "odd"}', "[" * 100_000])
def test_a_file_that_is_no_status_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"status\.json: No such file"):
        read_status(tmp_path)
    (tmp_path / STATUS).write_text(text)
    with pytest.raises(DataError, match=r"status\.json: not the status of a run") as raised:
        read_status(tmp_path)
    assert "\n" not in str(raised.value)
