"""A run whose disk is full, slow or gone: it pauses and loses nothing, or ends in one line."""

import asyncio
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fake_trainer import FakeTrainer
from tests.support.full_disk import full_disk
from tests.support.training_runs import ALONE, Run, config_of, lines
from treepo.cli.main import exit_code_of
from treepo.config.run import RunConfig
from treepo.data import background_writer
from treepo.errors import CheckpointError, DiskError
from treepo.training import disk_wait, run_folder
from treepo.training.checkpoints import newest

pytestmark = pytest.mark.usefixtures("graded")


@pytest.fixture
def instant_disk() -> None:
    """Here the disk has its thread."""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(disk_wait, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def straight(folder: Path, tmp_path: Path) -> RunConfig:
    """A finished run on a sound disk."""
    config = config_of(folder, tmp_path / "straight", steps=4, **ALONE)
    Run(config).train()
    return config


class Room(logging.Handler):
    """Makes room on the disk once something says that it waits."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._disk: full_disk | None = None
        self.told: list[str] = []

    def fill(self) -> None:
        self._disk = full_disk()
        self._disk.__enter__()

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())
        if "metrics.jsonl" in self.told[-1] and self._disk is not None:
            self._disk.__exit__()
            self._disk = None


@pytest.fixture
def room() -> Iterator[Room]:
    handler = Room()
    logging.getLogger("treepo").addHandler(handler)
    yield handler
    logging.getLogger("treepo").removeHandler(handler)
    full_disk().__exit__()


def same_history(first: RunConfig, second: RunConfig) -> None:
    assert (first.out / "trees.jsonl").read_bytes() == (second.out / "trees.jsonl").read_bytes()
    steps = [[line["step"] for line in lines(config.out / "metrics.jsonl")] for config in (first, second)]
    assert steps[0] == steps[1]


def trainer_that(before: Callable[[str], None]) -> FakeTrainer:
    trainer = FakeTrainer()
    trainer.before = before
    return trainer


def test_a_full_disk_that_gets_room_changes_nothing(
    folder: Path, tmp_path: Path, straight: RunConfig, room: Room
) -> None:
    trained: list[str] = []

    def fill_in_step_2(name: str) -> None:
        trained.extend([name] * (name == "train_batch"))
        if name == "train_batch" and len(trained) == 2:
            room.fill()

    config = config_of(folder, tmp_path / "run", steps=4, **ALONE)
    Run(config, trainer=trainer_that(fill_in_step_2)).train()
    same_history(config, straight)
    assert json.loads((config.out / "summary.json").read_text())["steps"] == 4
    assert sum("metrics.jsonl: File too large" in line for line in room.told) == 1
    assert sum("metrics.jsonl is written again" in line for line in room.told) == 1


def test_a_disk_that_stays_full_ends_the_run_in_one_line(
    folder: Path, tmp_path: Path, straight: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = full_disk()
    config = config_of(folder, tmp_path / "run", steps=4, disk_seconds=3.0, **ALONE)
    trained: list[str] = []

    def fill_in_step_3(name: str) -> None:
        trained.extend([name] * (name == "train_batch"))
        if len(trained) == 3:
            disk.__enter__()

    try:
        assert exit_code_of(lambda: Run(config, trainer=trainer_that(fill_in_step_3)).train()) == 1
    finally:
        disk.__exit__()
    output, errors = capsys.readouterr()
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "File too large, for 3 s (disk_seconds); " in line
    assert line.endswith("--resume continues from the newest checkpoint once it can be written")
    assert "Traceback" not in output + errors

    Run(config, resume=True).train()
    same_history(config, straight)


@pytest.mark.parametrize("failing", ["save", "finish_save", "export"])
def test_what_the_trainer_cannot_write_is_tried_again(
    folder: Path, tmp_path: Path, straight: RunConfig, failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    left = [3]

    def fail(name: str) -> None:
        if name == failing and left[0]:
            left[0] -= 1
            shutil.rmtree(tmp_path / "run" / "checkpoints" / ".step-00002.partial", ignore_errors=True)
            raise CheckpointError("checkpoint x: rank 1: No space left on device: x/y")

    config = config_of(folder, tmp_path / "run", steps=4, **ALONE)
    Run(config, trainer=trainer_that(fail)).train()
    same_history(config, straight)
    found = newest(config.out)
    assert found is not None
    assert found[1].steps_done == 4
    told = [record.getMessage() for record in caplog.records if record.name.endswith("disk_wait")]
    assert len(told) == 2, "one line at the beginning of the pause, and one at its end"
    assert told[0].startswith("checkpoint x: rank 1: No space left on device: x/y; ")
    assert "; the run pauses and tries again until " in told[0]
    assert " is written, after " in told[1]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(folder: Path, tmp_path: Path) -> None:
    def fail(name: str) -> None:
        if name == "finish_save":
            shutil.rmtree(tmp_path / "run" / "checkpoints" / ".step-00002.partial", ignore_errors=True)
            raise CheckpointError("checkpoint x: rank 1: No space left on device: x/y")

    config = config_of(folder, tmp_path / "run", steps=4, disk_seconds=3.0, **ALONE)
    with pytest.raises(DiskError, match=r"^checkpoint x: .*x/y, for 3 s \(disk_seconds\); --resume"):
        Run(config, trainer=trainer_that(fail)).train()


def test_a_deleted_folder_ends_the_run_and_stays_deleted(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run", steps=4, **ALONE)

    def delete(name: str) -> None:
        if name == "train_batch":
            shutil.rmtree(config.out, ignore_errors=True)

    with pytest.raises(DiskError, match="run was deleted while it was written to: its checkpoints are gone"):
        Run(config, trainer=trainer_that(delete)).train()
    assert not config.out.exists()


def test_a_run_without_tensorboards_folder_goes_on(
    folder: Path, tmp_path: Path, straight: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(folder, tmp_path / "run", steps=4, **ALONE)
    Run(
        config, trainer=trainer_that(lambda _: shutil.rmtree(config.out / "tensorboard", ignore_errors=True))
    ).train()
    same_history(config, straight)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("tensorboard" in line for line in told)
    assert 1 <= len(told) <= 2


def test_a_slow_disk_does_not_stop_the_event_loop(
    folder: Path, tmp_path: Path, straight: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fsync waits for turns of the event loop."""
    turns = threading.Semaphore(0)
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        for _ in range(20):
            assert turns.acquire(timeout=60)
        fsync(descriptor)

    async def turn() -> None:
        while True:
            turns.release()
            await asyncio.sleep(0)

    def start(name: str) -> None:
        if name == "train_batch" and not tasks:
            tasks.append(asyncio.get_running_loop().create_task(turn()))
        if name == "export":
            tasks[0].cancel()
            turns.release(10_000)

    tasks: list[asyncio.Task[None]] = []
    monkeypatch.setattr(os, "fsync", slow)
    config = config_of(folder, tmp_path / "run", steps=4, **ALONE)
    Run(config, trainer=trainer_that(start)).train()
    same_history(config, straight)


def test_lines_that_wait_too_long_are_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that hangs: one line while it does, one error when it has for `disk_seconds`."""
    answers = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: answers.wait())
    monkeypatch.setattr(run_folder, "_SLOW_SECONDS", 0.01)
    monkeypatch.setattr(disk_wait, "_SLOW_SECONDS", 0.02)
    monkeypatch.setattr(background_writer, "_LAST_SECONDS", 0.05)
    config = config_of(folder, tmp_path / "run", steps=4, disk_seconds=0.2, **ALONE)
    with pytest.raises(DiskError, match=r"the disk does not answer, for 0.2 s"):
        Run(config).train()
    answers.set()
    assert caplog.text.count("the disk does not answer; ") == 1
