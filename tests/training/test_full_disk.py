"""A disk that fills up during a command: one line with the file's name, and no file with half a line."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.full_disk import full_disk
from tests.support.random_trees import random_tree
from tests.training.test_resume import config as config
from treepo.cli.main import exit_code_of
from treepo.config.run import RunConfig
from treepo.data.output_folder import GrowingFile, log_to, write_file
from treepo.training.run_folder import RunFolder

LIMIT = 20_000  # bytes


def write_trees(folder: RunFolder) -> None:
    rng = np.random.default_rng(0)
    for step in range(10_000):
        folder.write_tree(random_tree(rng, "p", vocabulary=9, max_depth=2), step, "1")


def write_summary(folder: RunFolder) -> None:
    folder.write_summary({"text": "x" * 2 * LIMIT})


@pytest.mark.parametrize(("write", "name"), [(write_trees, "trees.jsonl"), (write_summary, "summary.json")])
def test_a_run_ends_with_the_name_of_the_file(
    config: RunConfig,
    capfd: pytest.CaptureFixture[str],
    write: Callable[[RunFolder], None],
    name: str,
) -> None:
    def run() -> None:
        with full_disk(limit=LIMIT), RunFolder(config) as folder:
            write(folder)

    assert exit_code_of(run) == 1
    output, errors = capfd.readouterr()
    assert errors.splitlines()[-1] == f"error: {config.out / name}: File too large"
    assert "Traceback" not in output + errors
    for line in (config.out / "trees.jsonl").read_bytes().splitlines():
        json.loads(line)
    assert not (config.out / "summary.json").exists()
    with RunFolder(config):  # the folder is free again
        pass


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with GrowingFile(tmp_path / "lines") as file:
        file.write(b"first\n")
        with full_disk(limit=50), pytest.raises(OSError, match=r"File too large.*lines"):
            file.write(b"x" * 100 + b"\n")
        file.write(b"second\n")
        assert file.sync() == 13
    assert (tmp_path / "lines").read_bytes() == b"first\nsecond\n"


def test_a_file_that_exists_stays_if_its_successor_does_not_fit(tmp_path: Path) -> None:
    write_file(tmp_path / "summary.json", "whole")
    with full_disk(limit=50), pytest.raises(OSError, match=r"File too large.*summary\.json"):
        write_file(tmp_path / "summary.json", "x" * 100)
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "whole"


def test_a_log_that_ends_is_one_warning_and_the_work_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("treepo.tests")
    with full_disk(limit=300), log_to(tmp_path / "log.txt"):
        for number in range(50):
            log.info("line %d", number)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"{tmp_path / 'log.txt'} ends here: File too large"]
    assert "Logging error" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(28, "No space left on device", "runs/x/a"), "error: runs/x/a: No space left on device"),
        (PermissionError(13, "Permission denied", "a"), "error: a: Permission denied"),
        (
            OSError(24, "Too many open files"),
            "error: standard output, or a file without a name: Too many open",
        ),
        (ExceptionGroup("", [OSError(28, "Full", "a"), OSError(28, "Full", "a")]), "error: a: Full"),
    ],
)
def test_an_error_of_the_machine_is_shown_once(
    error: Exception, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    assert exit_code_of(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(shown)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), OSError("no number"), EOFError()])
def test_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    def command() -> None:
        raise error

    with pytest.raises((ExceptionGroup, type(error))):
        exit_code_of(command)
