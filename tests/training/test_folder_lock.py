"""One command at a time writes into a folder; a dead one's folder is free at once."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.command import DEADLINE
from tests.support.evaluations import config_of
from tests.support.paths import ROOT
from tests.training.test_resume import config as config
from treepo.cli.main import app
from treepo.config.rollout import RolloutConfig
from treepo.data import folder_lock
from treepo.data.folder_lock import LOCK, Holder, check_free, locked
from treepo.data.output_folder import prepare_folder
from treepo.errors import ConfigError
from treepo.evaluation.evaluate import evaluate
from treepo.rollout.sample_file import rollout
from treepo.training.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from treepo.data.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the folder `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(DEADLINE)


def test_the_second_is_refused_with_the_first_s_process_host_and_start(tmp_path: Path, holder) -> None:
    for attempt in (locked(tmp_path / "run").__enter__, lambda: check_free(tmp_path / "run")):
        with pytest.raises(ConfigError) as error:
            attempt()
        said = str(error.value)
        assert f"run is in use by process {holder.pid} on {socket.gethostname()} (-c" in said
        assert ", started 20" in said
        assert "\n" not in said


def test_a_killed_holder_s_folder_is_free_at_once(tmp_path: Path, holder) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait(DEADLINE)
    assert (tmp_path / "run" / LOCK).exists()
    check_free(tmp_path / "run")
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_two_runs_in_one_process_do_not_share_a_folder_either(config) -> None:
    with RunFolder(config) as first:
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
            RunFolder(config).__enter__()
        first.write_metrics(1, {"reward": 0.5})
    assert not list(config.out.glob("previous-*"))
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 1
    with RunFolder(config):  # free again, and the lock is none of the files that are set aside
        assert (config.out / LOCK).exists()


def test_an_unreadable_text_does_not_hide_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        for text in (b"", b"{}", b"[" * 9999, b'{"process": null, "host": 1, "started": "x", "command": 2}'):
            (tmp_path / LOCK).write_bytes(text)
            with pytest.raises(ConfigError, match="is in use by another command"):
                check_free(tmp_path)


def write_holder(folder: Path, **changes: object) -> None:
    this = Holder.this()
    values = {name: getattr(this, name) for name in ("process", "host", "started", "command")} | changes
    (folder / LOCK).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, False),
        ({"host": "elsewhere"}, False),  # nobody here can tell
        ({"process": 2**22 + 7}, True),  # gone: above every process number
        ({"started": 1.0}, True),  # the number belongs to another process now
    ],
)
def test_without_locks_in_the_file_system_the_text_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], free: bool
) -> None:
    def unsupported(_file: int, _operation: int) -> None:
        raise OSError(folder_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    write_holder(tmp_path, **changes)
    if free:
        check_free(tmp_path)
    else:
        with pytest.raises(ConfigError, match="is in use by process"):
            check_free(tmp_path)


def test_a_free_lock_that_another_host_left_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_holder(tmp_path, host="elsewhere", process=5)
    with locked(tmp_path):
        assert Holder.of_text((tmp_path / LOCK).read_bytes()) == Holder.this()
    assert "process 5 on elsewhere" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"out: .*file/run: Not a directory"),
        locked(tmp_path / "file" / "run"),
    ):
        pass


def test_a_strangers_folder_is_left_as_it_is(config) -> None:
    config.out.mkdir(exist_ok=True)
    (config.out / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="but not of a run"), locked(config.out):
        prepare_folder(config.out, config)
    assert [entry.name for entry in config.out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("command", "example"), [("train", "quickstart"), ("rollout", "rollout"), ("eval", "eval-toy")]
)
def test_every_command_refuses_before_it_reads_its_inputs(
    tmp_path: Path, command: str, example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the example's model and data do not exist
    with locked(tmp_path):
        result = CliRunner().invoke(app, [command, str(ROOT / f"examples/{example}.yaml"), f"out={tmp_path}"])
    assert isinstance(result.exception, ConfigError)
    assert f"{tmp_path} is in use by process {os.getpid()} on " in str(result.exception)


def test_a_rollout_and_an_evaluation_hold_their_folders(tmp_path: Path) -> None:
    nothing: Any = None  # neither gets as far as its inputs
    rollout_config = RolloutConfig.model_validate(
        {"out": str(tmp_path), "model": {"path": "m"}, "data": {"prompts": "p.jsonl"}}
    )
    for work in (
        lambda: rollout(rollout_config, nothing, nothing, nothing),
        lambda: evaluate(config_of(str(tmp_path), 2), nothing, nothing, nothing),
    ):
        with locked(tmp_path), pytest.raises(ConfigError, match="is in use by process"):
            asyncio.run(work())
