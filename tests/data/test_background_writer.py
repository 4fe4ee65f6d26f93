"""Files that a thread writes: what the disk does not take waits, and is then there once and whole."""

import errno
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.full_disk import full_disk, wait_until
from treepo.data import background_writer
from treepo.data.background_writer import BackgroundWriter, BufferedFile, FolderGoneError

LINES = [b"%d %s\n" % (number, b"x" * number) for number in range(40)]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BufferedFile]:
    (tmp_path / "run").mkdir()
    file = BufferedFile(tmp_path / "run" / "lines")
    file.open()
    yield file
    file.close()


def test_a_full_disk_takes_every_line_once_when_it_has_room(file: BufferedFile) -> None:
    long = b"y" * 500 + b"\n"
    file.add(LINES[0])
    file.flush()
    for limit in (0, 5, 100, 400):
        file.add(LINES[limit // 100 + 1])
        file.add(long)
        with full_disk(limit=limit), pytest.raises(OSError, match="File too large"):
            file.flush()
        assert file.path.read_bytes() == LINES[0], "nothing is left of the attempt"
    assert file.waiting > 2000
    file.flush()
    assert file.waiting == 0
    long = b"y" * 500 + b"\n"
    assert (
        file.path.read_bytes()
        == LINES[0] + LINES[1] + long + LINES[1] + long + LINES[2] + long + LINES[5] + long
    )
    assert file.size == file.path.stat().st_size


def test_what_is_not_surely_on_the_disk_is_written_again(
    file: BufferedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the kernel has forgotten the pages, and a second fsync would succeed."""
    fsync = os.fsync

    def fails(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)  # the kernel lost them
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file.add(LINES[3])
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"Input/output error.*lines"):
        file.flush()
    monkeypatch.setattr(os, "fsync", fsync)
    file.add(LINES[4])
    file.flush()
    assert file.path.read_bytes() == LINES[3] + LINES[4]


def test_a_file_goes_on_where_it_ended(file: BufferedFile) -> None:
    file.path.write_bytes(b"before\n")
    again = BufferedFile(file.path)
    again.add(LINES[1])
    again.flush()
    again.close()
    assert file.path.read_bytes() == b"before\n" + LINES[1]


def test_a_deleted_file_is_put_back_whole(file: BufferedFile, caplog: pytest.LogCaptureFixture) -> None:
    file.add(LINES[1])
    file.flush()
    file.path.unlink()
    file.add(LINES[2])
    file.flush()
    assert file.path.read_bytes() == LINES[1] + LINES[2]
    assert [entry.name for entry in file.path.parent.iterdir()] == ["lines"]
    assert caplog.text.count("was deleted while it was written to; it is there again, whole") == 1


def test_a_moved_folder_is_waited_for_and_a_deleted_one_is_not(file: BufferedFile) -> None:
    elsewhere = file.path.parent.with_name("elsewhere")
    file.add(LINES[1])
    file.path.parent.rename(elsewhere)
    with pytest.raises(OSError, match="it was moved, or its disk is not there"):
        file.flush()
    assert not file.path.parent.exists(), "nothing is created in its place"
    elsewhere.rename(file.path.parent)
    file.flush()
    assert file.path.read_bytes() == LINES[1]
    shutil.rmtree(file.path.parent)
    file.add(LINES[2])
    with pytest.raises(FolderGoneError, match="run was deleted while it was written to"):
        file.flush()
    assert not file.path.parent.exists()


def test_the_thread_writes_until_all_is_there_and_says_two_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needed, other = BufferedFile(tmp_path / "needed"), BufferedFile(tmp_path / "other" / "file", limit=500)
    with BackgroundWriter([needed], [other], wait_seconds=60) as writer:
        with full_disk(limit=64):
            for line in LINES:
                needed.add(line)
                other.add(line)
                writer.wake()
            wait_until(lambda: caplog.text.count("bytes wait in memory") == 2)
        wait_until(lambda: not (needed.failure or other.failure or needed.waiting or other.waiting))
    assert (tmp_path / "needed").read_bytes() == b"".join(LINES)
    kept = (tmp_path / "other" / "file").read_bytes().splitlines(keepends=True)
    assert set(kept) < set(LINES)
    assert other.dropped == sum(map(len, LINES)) - sum(map(len, kept))
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 4
    ended = sorted(line for line in told if "is written again" in line)
    assert ended[1].endswith(f"it lacks {other.dropped} bytes")
    began = sorted(line for line in told if "wait in memory" in line)
    assert "needed: File too large; " in began[0]
    assert "the run pauses and tries again until " in began[0]
    assert "(disk_seconds = 60); free space or make it writable" in began[0]
    assert began[1].endswith("the command goes on without it")


def test_what_is_lost_at_the_end_is_said_and_hides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = BufferedFile(tmp_path / "file")

    def run() -> None:
        with BackgroundWriter([file]) as writer:
            file.add(b"x" * 200)
            writer.wake()
            raise ValueError("the reason of the end")

    with full_disk(), pytest.raises(ValueError, match="the reason of the end"):
        run()
    assert f"{file.path} lacks its last 200 bytes: File too large" in caplog.text


def test_a_disk_that_never_answers_does_not_keep_the_command_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    file = BufferedFile(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", lambda _: answers.wait())
    monkeypatch.setattr(background_writer, "_LAST_SECONDS", 0.05)
    with BackgroundWriter([file]) as writer:
        file.add(b"line\n")
        writer.wake()
    assert f"{file.path} lacks its last 5 bytes: the disk does not answer" in caplog.text
    answers.set()
