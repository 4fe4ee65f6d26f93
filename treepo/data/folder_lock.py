"""Lets one command at a time write into a folder.

    with locked(Path("runs/a")):   # ConfigError if another command writes there
        ...

The lock is the kernel's `flock` on `.lock` in the folder: it ends with the process that holds it, however
that ends, so a killed run's folder is free at once. The file's text says who holds it. It is removed at a
clean end.

NFS passes `flock` on between hosts, unless mounted with `nolock` or `local_lock`. If a file system has no
locks at all, the text alone decides: a process that is gone, or whose number another one has now, holds
nothing; one on another host cannot be asked, so it keeps the folder until its file is removed.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from treepo.errors import ConfigError

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of a file system
_SAME_SECONDS = 2.0  # between two readings of a process's start
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """The command that holds a lock. started: Unix seconds. command: such as `treepo train`."""

    process: int
    host: str
    started: float
    command: str

    @classmethod
    def this(cls) -> Self:
        process = psutil.Process()
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
        return cls(process.pid, socket.gethostname(), process.create_time(), command)

    @classmethod
    def of_text(cls, text: bytes) -> Self | None:
        """The holder that wrote the text; None if it is not whole."""
        try:
            holder = cls(**json.loads(text))
            time.localtime(holder.started)
        except (ValueError, TypeError, OverflowError, OSError, RecursionError):
            return None
        return holder

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as this host can tell."""
        with suppress(psutil.Error):
            return abs(psutil.Process(self.process).create_time() - self.started) < _SAME_SECONDS
        return False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.process} on {self.host} ({self.command}, started {since})"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, and make the folder if it does not exist. Raises ConfigError if it is held."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _hold(path)
    except OSError as error:
        raise ConfigError(f"out: {error.filename or path}: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # the folder itself may be gone
            path.unlink()
        os.close(file)


def check_free(folder: Path) -> None:
    """Raise ConfigError if a command writes into the folder at this moment."""
    if (folder / LOCK).exists():
        with locked(folder):
            pass


def _hold(path: Path) -> int:
    """Open and lock the file; returns its descriptor."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file, path)
            if _is_at(path, file):
                _take(file, path)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its holder removed it before we had the lock


def _lock(file: int, path: Path) -> None:
    """Lock the open file. Raises ConfigError if it is held."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, Holder.of_text(os.pread(file, 4096, 0))) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        holder = Holder.of_text(os.pread(file, 4096, 0))
        if holder is not None and not (holder.here and not holder.alive):
            raise _in_use(path, holder) from None
        _log.warning(
            "%s: this file system has no locks, so runs of several hosts in one folder are not prevented",
            path.parent,
        )


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _take(file: int, path: Path) -> None:
    """Write this process's name in place of a holder that did not end cleanly."""
    earlier = Holder.of_text(os.pread(file, 4096, 0))
    if earlier is not None and not earlier.here:
        _log.warning(
            "%s was last used by %s, which did not end cleanly; its lock is free, so it is taken to be gone",
            path.parent,
            earlier,
        )
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(asdict(Holder.this())).encode() + b"\n", 0)


def _in_use(path: Path, holder: Holder | None) -> ConfigError:
    who = "another command" if holder is None else str(holder)
    remedy = "wait for its end, or choose another folder"
    if holder is not None and not holder.here:
        remedy += f"; if that process is gone, remove {path}"
    return ConfigError(f"out: {path.parent} is in use by {who}: {remedy}")
