"""Where every process of a run is, on request: `kill -USR1 PID` of the command.

The command's threads and asyncio tasks, and the threads of the processes of engines, ranks and graders
below it, are written to stacks.txt in the run folder. A process that is stuck in native code answers too,
because faulthandler needs no Python to run.
"""

import asyncio
import faulthandler
import io
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

STACKS = "stacks.txt"
_ANSWER_SECONDS = 2.0
_QUIET_SECONDS = 0.2  # without output, after which a process has written everything
_log = logging.getLogger(__name__)


def heed_requests() -> None:
    """In a process below the command: write the stacks of all threads to standard error on SIGUSR1."""
    with suppress(OSError, io.UnsupportedOperation):  # standard error is no file
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def ignore_requests() -> None:
    """In a command that has no stacks to show: let SIGUSR1 not end it. A handler stays."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextmanager
def stack_dumps(folder: Path) -> Iterator[None]:
    """Let the command heed SIGUSR1 while the body runs; on the main thread with a running loop. If the folder
    cannot be written, its own stacks go to standard error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, path = asyncio.get_running_loop(), folder / STACKS
    file = _opened(path)

    def dump(number: int, frame: object) -> None:
        del number, frame  # faulthandler has written the threads already
        with suppress(OSError):
            _write(file, f"=== above: the threads of process {os.getpid()}, {time.ctime()}\n{_tasks(loop)}")
        threading.Thread(target=_dump_others, args=(file, path), name="stacks", daemon=True).start()

    before = signal.signal(signal.SIGUSR1, dump)
    faulthandler.register(signal.SIGUSR1, file, all_threads=True, chain=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, before)
        if file is not sys.stderr.buffer:
            with suppress(OSError):
                if not file.tell():
                    path.unlink(missing_ok=True)
                file.close()


def _opened(path: Path) -> BinaryIO:
    try:
        file = path.open("ab", buffering=0)
        file.seek(0, os.SEEK_END)
    except OSError as error:
        _log.info("%s: %s; SIGUSR1 writes to standard error", path, error.strerror)
        return sys.stderr.buffer
    return file  # type: ignore[reportReturnType]  # unbuffered, which BinaryIO allows


def _write(file: BinaryIO, text: str) -> None:
    file.write(text.encode(errors="backslashreplace"))
    file.flush()


def _tasks(loop: asyncio.AbstractEventLoop) -> str:
    """The stacks of all asyncio tasks."""
    text = io.StringIO()
    for task in asyncio.all_tasks(loop):
        task.print_stack(file=text)
    return text.getvalue()


def _dump_others(file: BinaryIO, path: Path) -> None:
    """Ask every process below this one, and add what it writes."""
    asked = [(process, log, size) for process in _heeding() for log, size in [_log_of(process)]]
    for process, _, _ in asked:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)
    with suppress(OSError, ValueError):  # ValueError: the command has ended meanwhile, and closed the file
        for process, log, size in asked:
            said = "its stacks are on standard error" if log is None else _appended(log, size)
            _write(file, f"=== process {process.pid}, {_name(process)}\n{said}\n")
    _log.warning("SIGUSR1: the stacks of %d processes are in %s", 1 + len(asked), path)


def _heeding() -> list[psutil.Process]:
    """The processes below this one that heed SIGUSR1; it would end any other."""
    return [one for one in psutil.Process().children(recursive=True) if _heeds(one.pid)]


def _heeds(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) & 1 << signal.SIGUSR1 - 1)


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()[:200]
    return "gone"


def _log_of(process: psutil.Process) -> tuple[Path | None, int]:
    """The file of the process's standard error, and its size so far; None if that is no file of its own."""
    try:
        path = Path(os.readlink(f"/proc/{process.pid}/fd/2"))
        if path.is_file() and not path.samefile("/proc/self/fd/2"):
            return path, path.stat().st_size
    except OSError:
        pass
    return None, 0


def _appended(log: Path, size: int) -> str:
    """What is written to the file beyond its first `size` bytes, once nothing more comes."""
    end = time.monotonic() + _ANSWER_SECONDS
    seen, quiet_since = size, time.monotonic()
    while (now := time.monotonic()) < end and (seen == size or now - quiet_since < _QUIET_SECONDS):
        time.sleep(_QUIET_SECONDS / 4)
        if (length := log.stat().st_size) != seen:
            seen, quiet_since = length, now
    with log.open("rb") as file:
        file.seek(size)
        return file.read().decode(errors="replace") or "it has not answered"
