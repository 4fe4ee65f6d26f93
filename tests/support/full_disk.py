"""A disk that is full for this process alone."""

import resource
import signal
import time
from collections.abc import Callable


class full_disk:  # noqa: N801  a context manager that reads like one
    """Within it this process can write only `limit` bytes to a file, if `full`; the error is EFBIG."""

    def __init__(self, full: bool = True, limit: int = 100) -> None:
        self._limit = limit if full else resource.RLIM_INFINITY

    def __enter__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails with an OSError instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._limit, resource.RLIM_INFINITY))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def wait_until(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what another thread or process does, which happens within moments."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
