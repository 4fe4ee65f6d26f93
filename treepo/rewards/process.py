"""The parent's end of one grading process: start, ask with a deadline, kill."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Pipe
from typing import Any

from treepo.config.reward import RewardConfig
from treepo.rewards.grade import GradeItem
from treepo.rewards.messages import Ready, Reply

START_SECONDS = 120.0


class WorkerDied(Exception):  # noqa: N818 (an event that the pool handles, not an error of the user)
    """The process ended before it answered; the text says how."""


class Worker:
    """One grading process, owned by the thread that makes it: when that thread ends, the kernel kills it."""

    def __init__(self, config: RewardConfig) -> None:
        self._stopping = threading.Lock()
        self._connection, child = Pipe()
        arguments = [str(child.fileno()), str(os.getpid()), str(config.memory_mb)]
        if config.function is not None:
            arguments.append(config.function)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "treepo.rewards.worker", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[child.fileno()],
            start_new_session=True,  # Ctrl-C is the parent's to handle, and children are killed with it
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        child.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> Ready:
        """Wait until the worker has imported everything. Raises WorkerDied."""
        return self._receive(START_SECONDS)

    def ask(self, item: GradeItem, deadline_seconds: float) -> Reply:
        """The reply to one item. Raises TimeoutError, WorkerDied; close the worker after either."""
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
        """Kill the process and what it started, and wait until it is gone. From any thread, repeatedly.

        A process that is dead already but not yet waited for keeps its id, so that no other is hit.
        """
        with self._stopping:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def close(self) -> None:
        """Stop, and free the pipe: for the owning thread."""
        self.stop()
        self._connection.close()
