"""A grading process: reads responses from a pipe one at a time and answers each.

treepo.rewards.keeper starts it and ends what it leaves behind. It may be killed at any moment.
"""

import contextlib
import logging
import os
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn, Self

from treepo.errors import one_line
from treepo.rewards.confinement import RefusedError, confine
from treepo.rewards.custom import BadGradeError, call, load_function, printable
from treepo.rewards.grade import PIPE_CLOSED, Grade, GradeItem, Ready, Reply, Request
from treepo.stack_dumps import heed_requests
from treepo.verdict import Verdict

Grader = Callable[[GradeItem], Grade]
_MONITOR = 3  # a tool id of sys.monitoring that is not reserved for any kind of tool


class Exhaustion:
    """Notices if memory or stack runs out anywhere in Python code, or if something is refused to it.

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
        if isinstance(error, MemoryError | RecursionError | RefusedError):
            self.seen = type(error).__name__


def make_grader(function: str | None) -> Grader:
    """Make the grader and warm it up: imports and first compilations must not count against an item."""
    if function is not None:
        own = in_this_process_only(lambda: load_function(function))
        return lambda item: in_this_process_only(lambda: call(own, item))
    from treepo.rewards.math_answer import math_grader  # here: a user's function may not need sympy

    math_grader(GradeItem(r"\boxed{\frac{1}{2}x}", "0.5x"))
    return math_grader


def grade(grader: Grader, item: GradeItem, exhaustion: Exhaustion) -> tuple[Grade, str | None]:
    """Grade one item; return the traceback too if the grader raised."""
    exhaustion.seen = None
    try:
        result = grader(item)
    except BadGradeError as error:
        return Grade(None, Verdict.ERROR, message=printable(one_line(error))), None
    except BaseException as error:  # whatever a function raises, the response has no grade
        message = printable(one_line(f"{type(error).__name__}: {error}"))
        return Grade(None, Verdict.ERROR, message=message), printable(_own_traceback(error))
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
    return _bytes(Path("/proc/self/statm").read_bytes())


def _bytes(statm: bytes) -> int:
    return int(statm.split()[0]) * resource.getpagesize()


def _leaks_descriptors() -> bool:
    """Whether half of the descriptors that this process may have are open."""
    return len(os.listdir("/proc/self/fd")) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


def in_this_process_only[T](function: Callable[[], T]) -> T:
    """Call `function`. A child that it forks does not come back from here: it ends, as a script ends.

    Such a child would otherwise grade on, beside its parent.
    """
    parent, error = os.getpid(), None
    try:
        return function()
    except BaseException as raised:
        error = raised
        raise
    finally:
        if os.getpid() != parent:
            _end_child(error)


def _end_child(error: BaseException | None) -> NoReturn:
    code = 0 if error is None else 1
    with contextlib.suppress(OSError, ValueError):  # the function may have closed the files
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            code = error.code or 0
        elif error is not None:
            sys.stderr.write(_own_traceback(error))
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    os._exit(code & 0xFF)


class Pipe:
    """The grading process's end of the pipe. Only the process that made it may send.

    A child that a reward function forks loses the pipe when it starts: it must not answer in its parent's
    place, nor hold the pipe open when its parent has crashed.
    """

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._owner = os.getpid()
        self._socket = _identity(fd)
        os.set_inheritable(fd, False)
        os.register_at_fork(after_in_child=self._connection.close)

    def receive(self) -> Request:
        """Wait for the next item. Raises EOFError when the parent is gone."""
        return self._connection.recv()

    def send(self, message: Ready | Reply) -> None:
        if os.getpid() != self._owner:
            os._exit(1)
        if _identity(self._connection.fileno()) != self._socket:  # another file may have taken its number
            os._exit(PIPE_CLOSED)
        self._connection.send(message)


def _identity(fd: int) -> tuple[int, int] | None:
    """What the descriptor refers to; None if it is closed."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def serve(pipe: Pipe, grader: Grader, memory_bytes: int, *, confined: bool) -> None:
    """Grade until the pipe closes. confined: without files, network and processes."""
    start, measure = address_space(), address_space
    resource.setrlimit(resource.RLIMIT_AS, (start + memory_bytes, start + memory_bytes))
    if confined:
        statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        measure = lambda: _bytes(os.pread(statm, 256, 0))  # noqa: E731  it can open nothing any more
        pipe.send(Ready(unconfined=confine()))
    else:
        pipe.send(Ready())
    with Exhaustion() as exhaustion, contextlib.suppress(EOFError):
        while True:
            request = pipe.receive()
            result, trace = grade(grader, request.item, exhaustion)
            retire = measure() - start > memory_bytes // 2 or (not confined and _leaks_descriptors())
            pipe.send(Reply(request.number, result, trace, retire))


def main(fd: int, memory_mb: int, function: str | None) -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    heed_requests()
    pipe = Pipe(fd)
    try:
        grader = make_grader(function)
    except BaseException:  # a module may raise SystemExit or an exception of its own kind
        pipe.send(Ready(printable(traceback.format_exc())))
        return
    serve(pipe, grader, memory_mb * 2**20, confined=function is None)  # the user's own has its freedom
