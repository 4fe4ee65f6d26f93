"""The parent's end of one grading process: start it, have it grade with a deadline, kill it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from treepo.config.reward import RewardConfig
from treepo.rewards.grade import GradeItem, Ready, Reply

START_SECONDS = 120.0


class WorkerDied(Exception):  # noqa: N818 (an event that the pool handles, not a user's error)
    """The process ended before it answered; the text says how."""


class Worker:
    """One grading process, owned by the thread that starts it: the kernel kills it when that thread ends."""

    def __init__(self, config: RewardConfig) -> None:
        self._stopping = threading.Lock()
        self._connection, child = Pipe()
        arguments = [str(child.fileno()), str(os.getpid()), str(config.memory_mb)]
        if config.function is not None:
            arguments.append(config.function)
        environment = {"PYTHONPATH": os.pathsep.join(_import_path(sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "treepo.rewards.worker", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[child.fileno()],
            start_new_session=True,  # the parent handles Ctrl-C, and kills the worker with its children
            env=os.environ | environment,
        )
        child.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> Ready:
        """Wait until the worker has imported everything. Raises WorkerDied."""
        return self._receive(START_SECONDS)

    def grade(self, item: GradeItem, deadline_seconds: float) -> Reply:
        """Have one item graded. Raises TimeoutError or WorkerDied; close the worker after either."""
        try:
            self._connection.send(item)
        except OSError as error:
            raise WorkerDied(self._how_it_died()) from error
        return self._receive(deadline_seconds)

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise TimeoutError
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._how_it_died()) from error

    def _how_it_died(self) -> str:
        self.stop()
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the grading process {how}"

    def stop(self) -> None:
        """Kill the process and its children, and wait until it is gone. From any thread, any number of times.

        A dead process keeps its id until it is waited for, so no other process is hit.
        """
        with self._stopping:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def close(self) -> None:
        """Stop the process and free the pipe. From the owning thread only."""
        self.stop()
        self._connection.close()


def _import_path(path: Sequence[str]) -> list[str]:
    """List the folders that a worker imports from: those of the parent's `path`, and this package's.

    An empty entry, as `python -c` has, means the working directory, which may have changed since
    the parent imported this package.
    """
    own = str(Path(__file__).parents[2])
    here = [os.getcwd()] if own in path else [os.getcwd(), own]
    folders = [folder for entry in path for folder in ([entry] if entry else here)]
    return folders if own in folders else [*folders, own]
