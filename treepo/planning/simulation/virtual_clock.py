"""An event loop whose time passes only when every task waits: hours take moments, and every run is the same.

The loop's clock is virtual (`asyncio.get_running_loop().time()`, `asyncio.sleep`, timeouts) and starts at 0
s; the system's is not. Tasks may not wait for a file, a socket, a thread or a process.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.SelectSelector):
    """Moves the clock on to the next timer instead of sleeping until then."""

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
    """The result of `work` in virtual time. Raises RuntimeError if all tasks wait without a timer."""
    results: list[T] = []

    async def keep() -> None:
        results.append(await work)

    with asyncio.Runner(loop_factory=_Loop) as runner:
        # The task returns nothing: a runner formats its task, result and all, when it restores a signal.
        runner.run(keep())
    return results[0]
