"""Bounds on what reading a hostile file or running a template may cost this process.

Only for the checks before anything starts: the bounds hold for all threads and for processes that start
meanwhile.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OverTimeError(Exception):
    """The body of `bounded_seconds` takes too long."""


@contextmanager
def bounded_memory(growth: int) -> Iterator[None]:
    """Let the body raise MemoryError once the process has `growth` bytes of address space more than now."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = [limit for limit in (before, hard) if limit != resource.RLIM_INFINITY]
    most = min([pages * resource.getpagesize() + growth, *limits])
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


@contextmanager
def bounded_seconds(seconds: float) -> Iterator[None]:
    """Raise OverTimeError in the body once the process has computed for so long; waiting does not count.

    Python delivers signals to the main thread only, so a body in another thread has no bound.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise OverTimeError

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
