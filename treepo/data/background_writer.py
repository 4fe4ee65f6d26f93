"""Files that a thread writes, so that a full, slow or absent disk neither blocks nor ends a command.

Bytes that the disk does not take stay in memory, and the thread tries again every second. After an error a
file holds what it held before, and the next attempt begins at the same place: nothing is lost or doubled.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

PAUSE_SECONDS = 1.0  # between two attempts to write
_LAST_SECONDS = 10.0  # for the last attempt, at the end of the command
_COPIED = 2**24  # bytes at a time
_log = logging.getLogger(__name__)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the body name `path`, as that of a write to an open file does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class FolderGoneError(Exception):
    """The file's folder was deleted."""


class BufferedFile:
    """A file that grows. `add` never waits; `flush` writes what has been added.

    limit: bytes that may wait for the disk; what does not fit is dropped and counted. None: no limit.
    durable: whether bytes count as written once they are on the disk, not in the kernel's memory alone.
    failure: why the last attempt to write failed. failing_since, waiting_since: by `time.monotonic`, when
    such attempts began, and when the first of the waiting bytes was added.
    """

    def __init__(self, path: Path, *, limit: int | None = None, durable: bool = True) -> None:
        self.path = path
        self.failure: OSError | FolderGoneError | None = None
        self.failing_since = self.waiting_since = 0.0
        self.waiting = 0
        self.dropped = 0
        self._limit, self._durable = limit, durable
        self._file: int | None = None
        self._closed = False
        self._size = 0
        self._added: list[bytes] = []
        self._lock = threading.Lock()  # guards what waits
        self._flushing = threading.Lock()

    def add(self, lines: bytes) -> None:
        """Append whole lines."""
        with self._lock:
            if self._limit is not None and self.waiting + len(lines) > self._limit:
                self.dropped += len(lines)
                return
            if not self._added:
                self.waiting_since = time.monotonic()
            self._added.append(lines)
            self.waiting += len(lines)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    @property
    def reason(self) -> str:
        """Why it is not written."""
        if isinstance(self.failure, OSError):
            return self.failure.strerror or str(self.failure)
        return str(self.failure or "the disk does not answer")

    def open(self) -> None:
        """Open or create the file, in a folder that exists or whose parent does. Raises OSError."""
        if self._file is None:
            self.path.parent.mkdir(exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._size = os.fstat(self._file).st_size

    def flush(self) -> None:
        """Write what was added. Raises OSError with the file's name, and FolderGoneError."""
        with self._flushing, naming(self.path):
            self.open()
            assert self._file is not None
            if not self._is_there():
                self._put_back()
            with self._lock:
                added = list(self._added)
            if added:
                size = self._write(self._file, added)
                with self._lock:
                    del self._added[: len(added)]
                    self.waiting -= size - self._size
                    self.waiting_since = time.monotonic()
                    self._size = size

    def close(self) -> None:
        """Close the file. A write that still hangs writes nothing more once it returns."""
        self._closed = True
        if self._flushing.acquire(blocking=False):
            if self._file is not None:
                with suppress(OSError):  # the last flush has told
                    os.close(self._file)
                self._file = None
            self._flushing.release()

    def _write(self, file: int, added: Sequence[bytes]) -> int:
        end = self._size
        try:
            for lines in added:
                rest = memoryview(lines)
                while rest:
                    self._check_open()
                    written = os.pwrite(file, rest, end)
                    rest, end = rest[written:], end + written
            if self._durable:
                os.fsync(file)
        except OSError:
            with suppress(OSError):
                self._check_open()  # else another writer may have the file
                os.ftruncate(file, self._size)
            raise
        return end

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.ECANCELED, "it was closed meanwhile", str(self.path))

    def _is_there(self) -> bool:
        """Whether the path still names the open file. Raises OSError and FolderGoneError."""
        assert self._file is not None
        opened = os.fstat(self._file)
        with suppress(FileNotFoundError):
            if os.path.samestat(opened, os.stat(self.path)):
                return True
        if opened.st_nlink:
            raise FileNotFoundError(errno.ENOENT, "it was moved, or its disk is not there", str(self.path))
        if not self.path.parent.is_dir():
            raise FolderGoneError(f"the folder {self.path.parent} was deleted while it was written to")
        return False

    def _put_back(self) -> None:
        """Write a file that was deleted again: its content lives as long as it is open."""
        assert self._file is not None
        part = self.path.with_name(f"{self.path.name}.part")
        copy = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            for start in range(0, self._size, _COPIED):
                os.pwrite(copy, os.pread(self._file, min(_COPIED, self._size - start), start), start)
            if os.fstat(copy).st_size != self._size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
            part.rename(self.path)
        except OSError:
            os.close(copy)
            with suppress(OSError):
                part.unlink()
            raise
        os.close(self._file)
        self._file = copy
        _log.warning("%s was deleted while it was written to; it is there again, whole", self.path)


class BackgroundWriter:
    """A context manager whose thread writes files, `needed` ones and others, whenever `wake` is called.

    wait_seconds: how long the command waits for a needed file that cannot be written, for the line that says
    so.
    """

    def __init__(
        self,
        needed: Sequence[BufferedFile] = (),
        others: Sequence[BufferedFile] = (),
        wait_seconds: float = 0.0,
    ) -> None:
        self._needed, self._wait_seconds = tuple(needed), wait_seconds
        self._files = (*self._needed, *others)
        self._work = threading.Event()
        self._ending = False
        self._told: dict[Path, set[str]] = {file.path: set() for file in self._files}
        # A daemon: a disk that never answers must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="files", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Try a last time to write what waits. What is lost is a warning, unless its reason was told."""
        self._ending = True
        self._work.set()
        self._thread.join(_LAST_SECONDS)
        for file in self._files:
            if file.waiting and file.reason not in self._told[file.path]:
                _log.warning("%s lacks its last %d bytes: %s", file.path, file.waiting, file.reason)
            file.close()

    def wake(self) -> None:
        """Have the files written soon."""
        self._work.set()

    def _run(self) -> None:
        ending = False
        while not ending:
            failing = any(file.failure for file in self._files)
            self._work.wait(PAUSE_SECONDS if failing else None)
            self._work.clear()
            ending = self._ending  # what was added before is written below
            for file in self._files:
                self._flush(file)

    def _flush(self, file: BufferedFile) -> None:
        try:
            file.flush()
        except (OSError, FolderGoneError) as failure:
            if file.failure is None:
                file.failing_since = time.monotonic()
            file.failure = failure
            if not self._ending:
                self._tell(file)
        else:
            if file.failure is not None:
                self._tell_end(file)
            file.failure = None

    def _tell(self, file: BufferedFile) -> None:
        """One line for each reason, until the file is written again."""
        if file.reason in self._told[file.path]:
            return
        self._told[file.path].add(file.reason)
        then = "the command goes on without it"
        if file in self._needed:
            then = how_to_go_on(self._wait_seconds, file.failing_since)
        _log.warning("%s: %s; %d bytes wait in memory; %s", file.path, file.reason, file.waiting, then)

    def _tell_end(self, file: BufferedFile) -> None:
        self._told[file.path].clear()
        seconds = time.monotonic() - file.failing_since
        lost = f"; it lacks {file.dropped} bytes" if file.dropped else ""
        _log.warning("%s is written again, after %.0f s%s", file.path, seconds, lost)


def how_to_go_on(wait_seconds: float, since: float) -> str:
    """What a run does that cannot write since then (`time.monotonic`), and what its user can do."""
    end = time.time() + wait_seconds - (time.monotonic() - since)
    clock = time.strftime("%H:%M:%S", time.localtime(end))
    return (
        f"the run pauses and tries again until {clock} (disk_seconds = {wait_seconds:g}); free space or make "
        "it writable, and it goes on by itself"
    )
