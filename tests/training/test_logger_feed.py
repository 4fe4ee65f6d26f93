"""A logger's process: it gets everything once, and whatever it does, the run neither ends nor waits."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.full_disk import wait_until
from tests.support.logger_process import calls_of
from tests.support.paths import ROOT
from treepo.training.loggers import feed as module
from treepo.training.loggers.feed import Feed, Message

PATIENT = 60.0


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACK_OFF_SECONDS", 0.0)


def feed_of(folder: Path, **options: Any) -> Feed:
    opening = {"folder": str(folder), "metrics": "metrics.jsonl", "options": options, "config": {}, "pid": 1}
    return Feed("noting", opening, "tests.support.logger_process")


def begin(step: int) -> dict[str, Any]:
    return {"kind": "begin", "step": step, "size": 0}


def add_steps(feed: Feed, *steps: int) -> None:
    for step in steps:
        record = {"step": step, "time": 1.0, "reward": step / 10}
        feed.add(Message(lambda record=record: {"kind": "metrics", "record": record}, 100, begin(step)))


def test_everything_is_done_once_and_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    feed = feed_of(tmp_path)
    feed.add(Message(lambda: begin(0), 0, begin(0)))
    add_steps(feed, 1, 2)
    feed.finish("finished")
    feed.wait(PATIENT)
    assert calls_of(tmp_path) == [
        ["begin", 0],
        ["metrics", 1, {"reward": 0.1}],
        ["metrics", 2, {"reward": 0.2}],
        ["end", "finished"],
    ]
    assert [record.getMessage() for record in caplog.records] == ["noting: ready"]


def test_a_process_that_dies_goes_on_after_its_last_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    feed = feed_of(tmp_path, die=2)
    feed.add(Message(lambda: begin(0), 0, begin(0)))
    add_steps(feed, 1, 2, 3)
    wait_until(lambda: len(calls_of(tmp_path)) == 5)
    feed.finish("failed")
    feed.wait(PATIENT)
    told = [(call[0], call[1]) for call in calls_of(tmp_path)]
    assert told == [
        ("begin", 0),
        ("metrics", 1),
        ("begin", 1),
        ("metrics", 2),
        ("metrics", 3),
        ("end", "failed"),
    ]
    assert caplog.messages == ["noting: its process was ended by SIGKILL; it is started again"]


def test_a_server_that_hangs_delays_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    feed = feed_of(tmp_path, hang=1)
    add_steps(feed, *range(1, 20))  # 10 fit
    wait_until(lambda: (tmp_path / "hang-1").exists())
    feed.finish("finished")
    feed.wait(0.0)
    assert caplog.messages == [
        "noting is too slow: 0 MiB wait; it lacks what follows",
        "noting is ended: it has not taken the last 11 messages in time",
        "noting lacks 9 messages, for which it was too slow",
    ]
    assert feed._process is None, "it was killed"
    assert calls_of(tmp_path) == []


def test_a_logger_that_cannot_start_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "token-1234567890")
    feed = feed_of(tmp_path, broken=True)
    add_steps(feed, 1)
    wait_until(lambda: feed._over)
    add_steps(feed, 2)
    feed.finish("finished")
    feed.wait(PATIENT)
    assert caplog.messages == [
        "noting: ImportError: no module named wandb, with ...; the run goes on without it"
    ]


def test_a_process_that_dies_again_and_again_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_RESTARTS", 1)
    opening = {"folder": str(tmp_path)}  # incomplete
    feed = Feed("noting", opening, "tests.support.logger_process")
    add_steps(feed, 1)
    wait_until(lambda: feed._over)
    died = "noting: its process ended with exit code 1"
    assert caplog.messages == [f"{died}; it is started again", f"{died}; the run goes on without it"]


def test_a_process_that_cannot_start_is_a_death(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(module, "_MOST_RESTARTS", 0)
    monkeypatch.setattr(module.subprocess, "Popen", refuse)
    feed = feed_of(tmp_path)
    wait_until(lambda: feed._over)
    assert caplog.messages == [
        "noting: its process cannot start: Resource temporarily unavailable; the run goes on without it"
    ]


RUN = """
import os, sys, time
from tests.training.test_logger_feed import Path, add_steps, calls_of, feed_of
folder = Path(sys.argv[1])
feed = feed_of(folder)
add_steps(feed, 1)
while not calls_of(folder):
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


def test_the_process_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], env=environment, check=False)
    wait_until(lambda: calls_of(tmp_path)[-1] == ["end", "stopped"])


def test_the_key_of_the_runs_ray_is_kept_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token-1234567890")
    feed = feed_of(tmp_path, hang=1)
    add_steps(feed, 1)
    wait_until(lambda: (tmp_path / "hang-1").exists())
    process = feed._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    feed.wait(0.0)
    assert b"token-1234567890" not in environment
