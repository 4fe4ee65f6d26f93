"""A disk that fills up during a command: one line with the file's name, and no file with half a line."""

import logging
from pathlib import Path

import pytest

from tests.support.full_disk import full_disk, wait_until
from treepo.cli.main import exit_code_of
from treepo.data.output_folder import GrowingFile, log_to, write_file


@pytest.fixture
def instant_disk() -> None:
    """Here the disk has its thread."""


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


def test_a_log_that_cannot_be_written_waits_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("treepo.tests")
    with log_to(tmp_path / "log.txt"), full_disk(limit=300):
        for number in range(50):
            log.info("line %d", number)
        wait_until(lambda: "log.txt: File too large" in caplog.text)
        log.info("the last line")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) <= 2, warnings
    assert warnings[0].endswith("bytes wait in memory; the command goes on without it")
    written = (tmp_path / "log.txt").read_text()
    assert [line.rpartition(" ")[2] for line in written.splitlines() if ": line " in line] == [
        str(number) for number in range(50)
    ]
    assert "the last line" in written
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
