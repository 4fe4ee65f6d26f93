"""Counts the share of time in which engines have nothing to do."""

import asyncio


class IdleClock:
    """Counts the seconds of each engine with and without requests, on the running loop's clock.

    engines: their number. While sampling is paused, no engine works on its requests.
    """

    def __init__(self, engines: int) -> None:
        self._requests = [0] * engines
        self._busy = 0  # engines with requests
        self.paused = False
        self._since: float | None = None
        self._seconds = self._busy_seconds = self._running_seconds = 0.0

    def begin(self, engine: int) -> None:
        """The engine gets a request."""
        self._count()
        self._busy += not self._requests[engine]
        self._requests[engine] += 1

    def end(self, engine: int) -> None:
        """The engine has answered a request."""
        self._count()
        self._requests[engine] -= 1
        self._busy -= not self._requests[engine]

    def pause(self) -> None:
        self._count()
        self.paused = True

    def go_on(self) -> None:
        self._count()
        self.paused = False

    def take(self) -> tuple[float, float]:
        """Since the last call: the share of the engines' time without work, and the seconds in which sampling
        was not paused.
        """
        self._count()
        idle = 1.0 - self._busy_seconds / self._seconds if self._seconds else 0.0
        running = self._running_seconds / len(self._requests)
        self._seconds = self._busy_seconds = self._running_seconds = 0.0
        return idle, running

    def _count(self) -> None:
        """Add the engines' seconds since the last event."""
        now = asyncio.get_running_loop().time()
        if self._since is not None:
            seconds = now - self._since
            self._seconds += seconds * len(self._requests)
            if not self.paused:
                self._running_seconds += seconds * len(self._requests)
                self._busy_seconds += seconds * self._busy
        self._since = now
