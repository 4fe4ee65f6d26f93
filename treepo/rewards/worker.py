"""A grading process: reads responses from a pipe one at a time and answers each.

treepo.rewards.process starts it as `python -P -m treepo.rewards.worker FD PARENT MEMORY_MB [FUNCTION]`. It
may be killed at any moment, and ends by itself when the pipe closes or the parent dies.
"""

import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from treepo.rewards.custom import call, load_function
from treepo.rewards.grade import Grade, GradeItem, Ready, Reply
from treepo.tree import Verdict

Grader = Callable[[GradeItem], Grade]
_PR_SET_PDEATHSIG = 1
_MONITOR = 3  # a tool id of sys.monitoring that is not reserved for any kind of tool


class Exhaustion:
    """Notices if memory or stack runs out anywhere in Python code.

    sympy and math-verify swallow every exception and go on with "not equal"; such a verdict does not count.
    """

    def __init__(self) -> None:
        self.seen: str | None = None

    def __enter__(self) -> Self:
        sys.monitoring.use_tool_id(_MONITOR, "treepo")
        sys.monitoring.register_callback(_MONITOR, sys.monitoring.events.RAISE, self._on_raise)
        sys.monitoring.set_events(_MONITOR, sys.monitoring.events.RAISE)
        return self

    def __exit__(self, *_: object) -> None:
        sys.monitoring.set_events(_MONITOR, sys.monitoring.events.NO_EVENTS)
        sys.monitoring.free_tool_id(_MONITOR)

    def _on_raise(self, _code: object, _offset: int, error: BaseException) -> None:
        if isinstance(error, MemoryError | RecursionError):
            self.seen = type(error).__name__


def make_grader(function: str | None) -> Grader:
    """Make the grader and warm it up: imports and first compilations must not count against an item."""
    if function is not None:
        own = load_function(function)
        return lambda item: call(own, item)
    from treepo.rewards.math_answer import math_grader  # here: a user's function may not need sympy

    math_grader(GradeItem(r"\boxed{\frac{1}{2}x}", "0.5x"))
    return math_grader


def grade(grader: Grader, item: GradeItem, exhaustion: Exhaustion) -> tuple[Grade, str | None]:
    """Grade one item; return the traceback too if the grader raised."""
    exhaustion.seen = None
    try:
        result = grader(item)
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"
        return Grade(None, Verdict.ERROR, message=message), _own_traceback(error)
    if exhaustion.seen and result.verdict is Verdict.WRONG and result.reward is None:
        return Grade(None, Verdict.ERROR, result.answer_text, f"{exhaustion.seen} while comparing"), None
    return result, None


def _own_traceback(error: BaseException) -> str:
    """The traceback from the first frame that is not ours; all of it if every frame is ours."""
    trace = error.__traceback__
    while trace is not None and Path(trace.tb_frame.f_code.co_filename).parent == Path(__file__).parent:
        trace = trace.tb_next
    return "".join(traceback.format_exception(error.with_traceback(trace or error.__traceback__)))


def address_space() -> int:
    """Bytes of this process's address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, even in the middle of an item."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this grading worker is gone")


def serve(connection: Connection, grader: Grader, memory_bytes: int) -> None:
    """Grade until the pipe closes."""
    start = address_space()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (start + memory_bytes, start + memory_bytes))
    connection.send(Ready())
    with Exhaustion() as exhaustion, contextlib.suppress(EOFError):
        while True:
            result, trace = grade(grader, connection.recv(), exhaustion)
            retire = address_space() - start > memory_bytes // 2
            connection.send(Reply(result, trace, retire))


def main(fd: int, parent: int, memory_mb: int, function: str | None = None) -> None:
    die_with(parent)
    # The parent handles Ctrl-C; Ray sends the signal to every descendant when it stops a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # a reward function's prints must not land in the table that the parent draws
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    connection = Connection(fd)
    try:
        grader = make_grader(function)
    except Exception:
        connection.send(Ready(failure=traceback.format_exc()))
        return
    serve(connection, grader, memory_mb * 2**20)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
