"""The parent's end of one grading process: start it, have it grade with a deadline, kill it."""

import io
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

import psutil

from treepo.config.reward import RewardConfig
from treepo.errors import one_line
from treepo.rewards.grade import PIPE_CLOSED, Grade, GradeItem, Ready, Reply, Request
from treepo.verdict import Verdict

START_SECONDS = 120.0
_MOST_BYTES = 2**26  # of a message from a grading process
_END_SECONDS = 10.0  # for a keeper to kill what is below it
_CLASSES = {
    (each.__module__, each.__qualname__): each for each in (Ready, Reply, Grade, Verdict)
}  # of messages; no other class is made from what a grading process sends


class WorkerDied(Exception):  # noqa: N818 (an event that the pool handles, not a user's error)
    """The process ended before it answered; the text says how."""


class Worker:
    """One grading process and its keeper, owned by the thread that starts them: both end with that thread."""

    def __init__(self, config: RewardConfig) -> None:
        self._stopping = threading.Lock()
        self._requests = 0
        self._connection, child = Pipe()
        _limit_waits(self._connection.fileno(), config.deadline_seconds)
        arguments = [str(child.fileno()), str(os.getpid()), str(config.memory_mb)]
        if config.function is not None:
            arguments.append(config.function)
        environment = {"PYTHONPATH": os.pathsep.join(_import_path(sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "treepo.rewards.keeper", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # never written to: it closes when all processes are gone
            pass_fds=[child.fileno()],
            start_new_session=True,  # the parent handles Ctrl-C
            env=os.environ | environment,
        )
        child.close()

    @property
    def pid(self) -> int:
        """The keeper's process id; the grading process is its child."""
        return self._process.pid

    def wait_ready(self) -> Ready:
        """Wait until the worker has imported everything. Raises WorkerDied."""
        return self._receive(START_SECONDS)

    def grade(self, item: GradeItem, deadline_seconds: float) -> Reply:
        """Have one item graded. Raises TimeoutError or WorkerDied; close the worker after either."""
        self._requests += 1
        try:
            self._connection.send(Request(self._requests, item))
        except BlockingIOError as error:
            raise TimeoutError from error
        except OSError:
            pass  # the pipe is closed; _receive waits for the reason
        reply = self._receive(deadline_seconds)
        if not isinstance(reply, Reply) or reply.number != self._requests:
            raise WorkerDied(f"the grading process sent no reply to request {self._requests}")
        return reply

    def _receive(self, seconds: float) -> Any:
        """Wait for a message. A crash is noticed at once, even if a child holds the pipe open."""
        end = time.monotonic() + seconds
        ready = wait([self._connection, self._gone], seconds)
        if self._connection in ready:
            try:
                message = self._connection.recv_bytes(_MOST_BYTES)
            except (EOFError, OSError):  # it has ended, or its function has closed the pipe and goes on
                ready = wait([self._gone], max(end - time.monotonic(), 0))
            else:
                return _read(message)
        if self._gone not in ready:
            raise TimeoutError
        raise WorkerDied(self._how_it_died())

    @property
    def _gone(self) -> Any:
        """Readable when all processes are gone."""
        return self._process.stdout

    def _how_it_died(self) -> str:
        self._process.wait()
        code = self._process.returncode
        if code == PIPE_CLOSED:
            return "the function closed the pipe of its grading process"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the grading process {how}"

    def stop(self) -> None:
        """Kill the process and all that it started, and wait until they are gone. From any thread, any number
        of times.

        A dead process keeps its id until it is waited for, so no other process is hit.
        """
        with self._stopping:
            if self._process.returncode is None:
                self._process.terminate()  # the keeper kills the others
                self._process.send_signal(signal.SIGCONT)  # it may have been stopped
                try:
                    self._process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:
                    self._kill_all()

    def _kill_all(self) -> None:
        """Kill everything at once, without the keeper's help."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stop the process and free the pipe. From the owning thread only."""
        self.stop()
        self._connection.close()
        self._gone.close()


def _read(message: bytes) -> Ready | Reply:
    """Raises WorkerDied if a function has written to the pipe of its process."""
    try:
        content = _Reader(io.BytesIO(message)).load()
    except Exception as error:  # anything may be in it, and reading it can raise anything
        raise WorkerDied(f"the grading process sent no reply: {one_line(error)[:100]}") from None
    if not isinstance(content, Ready | Reply):
        raise WorkerDied("the grading process sent no reply")
    return content


class _Reader(pickle.Unpickler):
    """Makes the classes of messages and no others: a message never runs code here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a message")
        return _CLASSES[module, name]


def _limit_waits(fd: int, seconds: float) -> None:
    """Have a message that stops midway, as to a stopped process, end in BlockingIOError after `seconds`."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) + 1)
    with socket.socket(fileno=os.dup(fd)) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _import_path(path: Sequence[str]) -> list[str]:
    """List the folders that a worker imports from: those of the parent's `path`, and this package's.

    An empty entry, as `python -c` has, means the working directory, which may have changed since
    the parent imported this package.
    """
    own = str(Path(__file__).parents[2])
    here = [os.getcwd()] if own in path else [os.getcwd(), own]
    folders = [folder for entry in path for folder in ([entry] if entry else here)]
    return folders if own in folders else [*folders, own]
