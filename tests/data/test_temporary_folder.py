"""The private folder of temporary files: who sees it, and who removes it."""

import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from treepo.data import temporary_folder as module
from treepo.data.folder_lock import LOCK
from treepo.data.temporary_folder import (
    TemporaryFolder,
    keep_compiled_code,
    remove_abandoned,
    temporary_folder,
)
from treepo.errors import ConfigError

_HOLDER = """
import sys
from treepo.data.temporary_folder import TemporaryFolder
folder = TemporaryFolder()
with folder.used():
    inner = TemporaryFolder()
    (inner.path / "file").touch()
    print(folder.path, inner.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in module._COMPILED:
        monkeypatch.setenv(name, "")  # to be restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(module, "_SHARED_MEMORY", folder)
    return folder


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def killed() -> tuple[Path, Path]:
    """The folder of a command that was killed, and that of its engine inside."""
    process = holder()
    assert process.stdout is not None
    outer, inner = map(Path, process.stdout.readline().split())
    kill(process)
    return outer, inner


def holder() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_it_is_private_and_used_by_this_process_and_by_others(base: Path) -> None:
    before = tempfile.gettempdir()
    with temporary_folder() as folder:
        assert folder.parent == base
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert tempfile.gettempdir() == str(folder)
        told = subprocess.check_output(
            [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
        )
        assert told.decode().strip() == str(folder)
        lock = multiprocessing.get_context("spawn").Lock()
        assert lock._semlock.name.startswith(f"/{folder.name}-")  # type: ignore[reportAttributeAccessIssue]
        del lock  # before its file is removed
    assert tempfile.gettempdir() == before
    assert not folder.exists()


def test_its_end_may_come_twice() -> None:
    twice = TemporaryFolder()
    twice.close()
    twice.close()
    assert not twice.path.exists()


def test_the_next_start_removes_what_a_killed_command_left(shared_memory: Path) -> None:
    outer, inner = killed()
    assert inner.parent == outer
    ours = [shared_memory / f"sem.{outer.name}-1", shared_memory / f"sglang_loads_{inner.name}_ab.shm"]
    others = [shared_memory / "sglang_loads_0123_ab.shm", shared_memory / "sem.mp-1"]
    for file in ours + others:
        file.touch()
    TemporaryFolder().close()
    assert not outer.exists()
    assert not any(file.exists() for file in ours)
    assert all(file.exists() for file in others)


def test_a_running_commands_folder_stays(base: Path) -> None:
    process = holder()
    assert process.stdout is not None
    outer, inner = map(Path, process.stdout.readline().split())
    remove_abandoned(base)
    remove_abandoned(outer)
    assert (inner / "file").exists()
    kill(process)
    remove_abandoned(base)
    assert not outer.exists()


def test_others_folders_stay(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder whose command was killed, a folder that merely has such a name, and another user's."""
    outer, _ = killed()
    text = (outer / module._LOCK).read_bytes()
    run = base / "treepo-mybranch"
    run.mkdir(mode=0o700)
    (run / LOCK).write_bytes(text)
    longer = base / "treepo-my-branch"
    longer.mkdir(mode=0o700)
    (longer / module._LOCK).write_bytes(text)
    open_to_all = base / "treepo-abcdefgh"
    open_to_all.mkdir(mode=0o755)
    (open_to_all / module._LOCK).write_bytes(text)
    half = base / "treepo-ijklmnop"
    half.mkdir(mode=0o700)
    (half / module._LOCK).touch()  # it has no holder yet
    link = base / "treepo-qrstuvwx"
    link.symlink_to(outer)
    remove_abandoned(base)
    assert not outer.exists()
    assert all(os.path.lexists(folder) for folder in (run, longer, open_to_all, half, link))
    outer, _ = killed()
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    remove_abandoned(base)
    assert outer.exists()


def test_without_locks_the_text_decides(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    outer, _ = killed()
    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    alive = TemporaryFolder()
    assert not outer.exists()
    remove_abandoned(base)
    assert alive.path.exists()
    alive.close()


def test_a_path_too_long_for_sockets(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deep = base / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    with temporary_folder(60) as folder:
        assert folder.parent == Path("/tmp")
    assert f"TMPDIR={deep}: too long" in caplog.text
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    with pytest.raises(ConfigError, match=f"RAY_TMPDIR={deep}: too long .* at most 31 bytes"):
        TemporaryFolder(60)


def test_a_folder_that_does_not_exist(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(base / "gone"))
    with pytest.raises(ConfigError, match=r"gone: no folder for temporary files .* TMPDIR names"):
        TemporaryFolder()


def test_a_full_disk_is_one_line_and_leaves_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConfigError, match=r"no folder for temporary files .* No space left"):
        TemporaryFolder()
    assert not list(base.glob("treepo-*"))
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_folder_that_a_kill_left_without_a_holder_goes_after_a_minute(base: Path) -> None:
    half = base / "treepo-ijklmnop"
    half.mkdir(mode=0o700)
    (half / module._LOCK).touch()
    held = os.open(half / module._LOCK, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.utime(held, (0, 0))
    remove_abandoned(base)
    assert half.exists(), "its command is slow to make it"
    os.close(held)
    remove_abandoned(base)
    assert not half.exists()


def test_compiled_kernels_are_kept(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_CACHE_DIR", "mine")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(base / "cache" / "treepo" / "torchinductor")
    assert os.environ["CUTE_DSL_CACHE_DIR"] == "mine"
    assert stat.S_IMODE((base / "cache" / "treepo").stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_written(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    (base / "cache").touch()
    keep_compiled_code()
    assert "compiled kernels are not kept" in caplog.text
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
