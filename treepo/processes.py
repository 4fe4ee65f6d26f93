"""The kernel's ties between processes: deaths that end others, orphans, and how a child ended."""

import ctypes
import math
import os
import signal
import time
from contextlib import suppress

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def die_with_parent(by: signal.Signals) -> None:
    """Have the kernel send the signal to this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)


def adopt_orphans() -> None:
    """Make processes below this one its children when their own parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_descendants(seconds: float = math.inf) -> None:
    """Kill all processes below this one, and wait until they are gone, at most so long.

    A process that waits for a disk that does not answer goes only when the disk does.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def how_ended(child: int) -> str:
    """How the child process ended, which stays to be waited for; empty if it runs or is no child."""
    try:
        end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return ""
    if end is None:
        return ""
    if end.si_code == os.CLD_EXITED:
        return f"ended with exit code {end.si_status}"
    return f"was ended by {signal.Signals(end.si_status).name}"
