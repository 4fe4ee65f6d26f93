"""Keeps one grading process: starts it, waits until it ends, and kills whatever it has started.

treepo.rewards.process starts it as `python -P -m treepo.rewards.keeper FD PARENT MEMORY_MB [FUNCTION]`; it
forks the grading process (treepo.rewards.worker). A process below it whose parent dies becomes the keeper's
child (PR_SET_CHILD_SUBREAPER), so a reward function cannot detach a process by a session of its own.

The keeper runs no code of the user. It ends as the grading process did, with the same exit code or signal, or
at SIGTERM, which the kernel sends when the parent dies. Its standard output, which no other process holds,
closes when all are gone.
"""

import contextlib
import os
import resource
import signal
import sys
from typing import NoReturn

from treepo.processes import adopt_orphans, die_with_parent, kill_descendants

_WAITED = {signal.SIGTERM, signal.SIGCHLD}


def die_with(parent: int, by: signal.Signals) -> None:
    """Have the kernel send the signal `by` to this process when `parent` dies."""
    die_with_parent(by)
    if os.getppid() != parent:
        sys.exit("the process that started this grading process is gone")


def wait_for(worker: int) -> int:
    """Wait until `worker` has ended or SIGTERM comes; return the wait status with which to end."""
    while signal.sigwait(_WAITED) != signal.SIGTERM:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    return ended[1]
    return signal.SIGTERM  # the status of a process that the signal has ended


def end_as(status: int) -> NoReturn:
    """End this process by the signal or exit code of a wait status."""
    if os.WIFSIGNALED(status):
        by = os.WTERMSIG(status)
        if by != signal.SIGKILL:
            signal.signal(by, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {by})
        os.kill(os.getpid(), by)
    sys.exit(os.WEXITSTATUS(status))


def main(fd: int, parent: int, memory_mb: int, function: str | None = None) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    # The parent handles Ctrl-C; Ray sends the signal to every descendant when it stops a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent, signal.SIGTERM)
    adopt_orphans()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        # A reward function's prints must not land in the table that the parent draws.
        os.dup2(2, 1)
        os.setsid()  # a signal that it sends to its process group does not reach the keeper
        die_with(keeper, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED)
        from treepo.rewards import worker as grading  # here: the keeper stays small

        grading.main(fd, memory_mb, function)
        return
    os.close(fd)
    status = wait_for(worker)
    kill_descendants()
    end_as(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
