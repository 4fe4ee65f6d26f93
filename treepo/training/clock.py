"""Where a run's time goes, and who is told what it does."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Whoever shows the run to a person."""

    def phase(self, name: str, announce: bool = False) -> None:
        """What the run does from now on; `announce` where it lasts long and comes once."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""


class Clock:
    """Seconds spent in each phase; tells the reporter which phase it is."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def total(self) -> float:
        """Seconds in all, those before a run was interrupted included."""
        return time.perf_counter() - self._started

    def add(self, total: float, seconds: Mapping[str, float]) -> None:
        """Count what was spent before the run was interrupted."""
        self._started -= total
        names = [*seconds, *(name for name in self.seconds if name not in seconds)]
        self.seconds = {name: seconds.get(name, 0.0) + self.seconds.get(name, 0.0) for name in names}

    @contextmanager
    def phase(self, name: str, announce: bool = False) -> Iterator[None]:
        self._reporter.phase(name, announce)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
