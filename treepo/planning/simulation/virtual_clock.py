"""An event loop whose time passes only when every task waits: hours in moments, the same at every run.

The loop's own clock is virtual (`asyncio.get_running_loop().time()`, `asyncio.sleep`, timeouts); the system's
is not. Nothing may wait for a file, a socket, a thread or a process. Seconds start at 0.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.SelectSelector):
    """Where a loop would sleep until its next timer, the time of that timer has come."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits for something that will never come")
        self.now += timeout
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run_virtually[T](work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` in virtual time. Raises RuntimeError where all tasks wait without a timer."""
    results: list[T] = []

    async def keep() -> None:
        results.append(await work)

    with asyncio.Runner(loop_factory=_Loop) as runner:
        # Not returned by the task: a runner formats its task, result and all, when it restores a signal.
        runner.run(keep())
    return results[0]
