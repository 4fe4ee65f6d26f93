"""How a command ends before its work is done: by SIGTERM or Ctrl-C, or because it has waited too long to end.

The first signal cancels the work, which then ends everything that it started. A second one, or a clean-up
beyond its deadline, kills every process below this one and ends this one at once; so no process is left in
any case. No reader sees a half-written file.
"""

import _thread
import asyncio
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from treepo.processes import adopt_orphans, kill_descendants

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"
CLEANUP_SECONDS = 60.0
"""From the signal until a clean-up that has not ended is cut short: engines end within 30 s."""
_KILL_SECONDS = 10.0  # for killed processes to go; one that waits for a stalled disk does not
_LINE_SECONDS = 2.0  # for the last line, which may read a disk that is stalled
_SHORT_LINE = "Interrupted."
_skips_exit_handlers = False


class Stopped(BaseException):
    """A signal has ended the command. exit_code: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.by = by
        self.exit_code = 128 + by


class Stopper:
    """A context manager that turns SIGTERM and Ctrl-C into `Stopped`, at whatever the body is doing.

    farewell: the last line, if the clean-up is cut short. received: the first signal so far. Only for the
    main thread. A signal that the parent had set to be ignored stays ignored.
    """

    def __init__(self, farewell: Callable[[signal.Signals], str]) -> None:
        self.received: signal.Signals | None = None
        self._farewell = farewell
        self._work: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """After a signal: 130 for Ctrl-C, 143 for SIGTERM."""
        assert self.received is not None
        return 128 + self.received

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """As asyncio.run. Raises Stopped after a signal, once the work has ended all that it started."""
        try:
            result = asyncio.run(self._stoppable(work))
        except asyncio.CancelledError:
            if self.received is None:
                raise
            raise Stopped(self.received) from None
        finally:
            self._work = None
        if self.received is not None:  # too late to cancel anything
            raise Stopped(self.received)
        return result

    async def _stoppable[T](self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._work = asyncio.get_running_loop(), task
        return await work

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:
            end_now(lambda by=self.received: self._farewell(by), self.exit_code)
        self.received = signal.Signals(number)
        end_within(CLEANUP_SECONDS, lambda by=self.received: self._farewell(by), self.exit_code)
        if self._work is None:
            raise Stopped(self.received)
        loop, _ = self._work
        loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        assert self.received is not None
        if self._work is not None:
            _log.info("%s: the command ends", self.received.name)
            self._work[1].cancel()


def end_within(seconds: float, line: Callable[[], str], exit_code: int) -> None:
    """Unless this process has ended by then, do as `end_now`."""

    def last_line() -> str:
        _log.error("the clean-up has not ended within %g s and is cut short", seconds)
        return line()

    def wait() -> None:
        time.sleep(seconds)
        end_now(last_line, exit_code)

    threading.Thread(target=wait, name="ending", daemon=True).start()


def end_now(line: Callable[[], str], exit_code: int) -> NoReturn:
    """Kill every process below this one, write the line to standard error, and end this process.

    Nothing delays that for long: not a process that cannot be killed, nor a line or a terminal that blocks.
    """
    try:
        adopt_orphans()  # what a killed process leaves becomes our child
        kill_descendants(_KILL_SECONDS)
        said = _within(_LINE_SECONDS, line) or _SHORT_LINE
        _within(_LINE_SECONDS, lambda: _write(said))
    finally:
        os._exit(exit_code)


def _within[T](seconds: float, ask: Callable[[], T]) -> T | None:
    """The answer; None if there is none in time, or an error."""
    answers: queue.SimpleQueue[T | None] = queue.SimpleQueue()

    def call() -> None:
        answer = None
        with suppress(Exception):  # of whatever kind: the process ends all the same
            answer = ask()
        answers.put(answer)

    # threading.Thread has a lock, which the code that a signal has interrupted may hold.
    _thread.start_new_thread(call, ())
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None


def _write(line: str) -> None:
    if sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR)
    os.write(2, line.encode() + b"\n")


def skip_exit_handlers() -> None:
    """Let `leave` end this process at once: an exit handler of a library would wait for what is dead."""
    global _skips_exit_handlers
    _skips_exit_handlers = True


def leave(exit_code: int) -> NoReturn:
    """End this process, whose command has ended everything that it started."""
    if _skips_exit_handlers:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def ignore_signals() -> None:
    """For a command that has ended: a late signal must not disturb the end of the interpreter."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
