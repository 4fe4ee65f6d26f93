"""Feeds one logger's process (`treepo.training.loggers.process`) from a queue, so that a run never waits for
a server and never ends with a logger.

A message leaves the queue once the process has done what it says. A process that dies is started again and
goes on after the last step that it has done.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo.processes import how_ended
from treepo.training.loggers.logger import State

MODULE = "treepo.training.loggers.process"
MOST_BYTES = 2**26  # that may wait
_MOST_RESTARTS = 3  # in a row, without a message done
_EXIT_SECONDS = 5.0  # for a process that has nothing left to do
_TROUBLED_SECONDS = 3.0  # that the end of the run waits for a server that is down
_ROOT = str(Path(__file__).parents[3])
_BACK_OFF_SECONDS = 5.0  # before the first restart; twice as long before each further one
_log = logging.getLogger(__name__)


class _DeadError(Exception):
    """The process has ended before it has done what it was told; the text says how."""


class _GivenUpError(Exception):
    """The process says that it cannot log anything, and why."""


@dataclass(frozen=True, slots=True)
class Message:
    """What the logger shall do. make: its content, called in the feed's thread. size: about its bytes.

    after: where a process that is started again begins once this is done; None: where it did before.
    """

    make: Callable[[], Mapping[str, Any]]
    size: int
    after: Mapping[str, Any] | None = None


class Feed:
    """A logger that runs, by name, until it is to finish.

    opening: what its process, which runs `module`, is told first.
    """

    def __init__(self, name: str, opening: Mapping[str, Any], module: str = MODULE) -> None:
        self.name = name
        self._opening, self._module = opening, module
        self._begin: Mapping[str, Any] | None = None
        self._waiting: deque[Message] = deque()
        self._size = self._dropped = 0
        self._changed = threading.Condition()  # guards the attributes above and below
        self._ending = self._over = False
        self._failures = 0
        self._troubled = False  # the server is down, or refuses
        self._process: subprocess.Popen[bytes] | None = None
        # A daemon: a server that never answers must not keep the run's process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, message: Message) -> None:
        """Have it logged. What does not fit into the queue is left out, with one warning."""
        with self._changed:
            if self._over:
                return
            if self._size + message.size > MOST_BYTES:
                self._dropped += 1
                first = self._dropped == 1
            else:
                self._waiting.append(message)
                self._size += message.size
                self._changed.notify()
                return
        if first:
            _log.warning("%s is too slow: %d MiB wait; it lacks what follows", self.name, MOST_BYTES >> 20)

    def finish(self, state: State) -> None:
        """Have the process end once it has done everything."""
        self.add(Message(lambda: {"kind": "end", "state": state}, 0))
        with self._changed:
            self._ending = True
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Wait until the process ends, and kill it at its deadline, which is short if its server is down."""
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._thread.join(min(left, _TROUBLED_SECONDS))
            if self._troubled:
                break
        with self._changed:
            late, self._over = not self._over, True
            waiting = len(self._waiting)
        self._kill()
        if late:
            _log.warning("%s is ended: it has not taken the last %d messages in time", self.name, waiting)
        if self._dropped:
            _log.warning("%s lacks %d messages, for which it was too slow", self.name, self._dropped)

    def _run(self) -> None:
        while not self._over:
            try:
                self._serve()
                break
            except _GivenUpError as reason:
                _log.warning("%s: %s; the run goes on without it", self.name, reason)
                break
            except _DeadError as reason:
                if not self._goes_on(reason):
                    break
        self._over = True

    def _goes_on(self, reason: _DeadError) -> bool:
        """Wait a while after a death. Returns whether the process is to be started again."""
        if self._over:
            return False
        self._failures += 1
        if self._ending or self._failures > _MOST_RESTARTS:
            _log.warning("%s: %s; the run goes on without it", self.name, reason)
            return False
        _log.warning("%s: %s; it is started again", self.name, reason)
        with self._changed:
            self._changed.wait_for(lambda: self._ending, _BACK_OFF_SECONDS * 2 ** (self._failures - 1))
        return True

    def _serve(self) -> None:
        """Start a process and have it do everything, to the end. Raises _DeadError and _GivenUpError."""
        process = self._started()
        try:
            self._tell(process, self._opening)
            if self._begin is not None:
                self._have_done(process, self._begin)
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting)
                    message = self._waiting[0]
                content = message.make()
                self._have_done(process, content)
                self._failures = 0
                with self._changed:
                    self._begin = message.after or self._begin
                    self._waiting.popleft()
                    self._size -= message.size
                if content["kind"] == "end":
                    self._how_ended(process)
                    return
        finally:
            self._kill()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with suppress(OSError):
                    stream.close()

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([_ROOT, *filter(None, sys.path)])
        # The key of the run's Ray is nobody else's.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with self._changed:
            if self._over:
                raise _DeadError("the run has ended")
            try:
                self._process = process = subprocess.Popen(
                    [sys.executable, "-P", "-m", self._module, self.name, str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # the run handles Ctrl-C
                    env=environment | {"PYTHONPATH": path},
                )
            except OSError as error:  # no room for a process or a pipe
                raise _DeadError(f"its process cannot start: {error.strerror}") from None
        return process

    def _tell(self, process: subprocess.Popen[bytes], content: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(content).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise _DeadError(f"its process {self._how_ended(process)}") from None

    def _have_done(self, process: subprocess.Popen[bytes], content: Mapping[str, Any]) -> None:
        """Wait until the process has done it; what it says meanwhile goes to the log."""
        self._tell(process, content)
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            if "done" in answer:
                self._troubled = False
                return
            if "given_up" in answer:
                raise _GivenUpError(answer["given_up"])
            self._troubled = "trouble" in answer
            for kind, text in answer.items():
                _log.log(logging.INFO if kind == "info" else logging.WARNING, "%s: %s", self.name, text)
        raise _DeadError(f"its process {self._how_ended(process)}")

    def _how_ended(self, process: subprocess.Popen[bytes]) -> str:
        """How the process ended, which is about to."""
        deadline = time.monotonic() + _EXIT_SECONDS
        while time.monotonic() < deadline:
            if how := how_ended(process.pid):
                return how
            time.sleep(0.01)
        return "has closed its pipes"

    def _kill(self) -> None:
        """Kill the process and what it has started, if they have not ended. Any number of times."""
        with self._changed:
            process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):  # it was not waited for, so the id is its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
