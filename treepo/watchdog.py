"""Knows who waits for whom and since when. Warns on the terminal, and writes the status of a run;
SIGUSR1 makes it write where every process is (`treepo.stack_dumps`).

A wait that lasts is named long before any library's own timeout. It is named again after twice as long, and
so on. Whatever waits says so with one line, `with waiting(...)`; the watchdog of the command finds it.

    status.json    state, step, phase, waits, engines, the last step's numbers, those of the last evaluation,
                   pace, health warnings, process, time of writing
"""

import asyncio
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import psutil

from treepo.data.output_folder import write_file
from treepo.errors import one_line, shortened
from treepo.stack_dumps import stack_dumps

STATUS = "status.json"
TICK_SECONDS = 5.0
"""Between two looks, each of which writes the status."""
_SHOWN_WAITS = 8
_SHOWN_ENGINES = 8
_SAVE_SECONDS, _LAST_SECONDS = (
    0.05,
    5.0,
)  # that the event loop waits for the disk, while it runs and at the end
_log = logging.getLogger(__name__)
_waits: dict["Wait", None] = {}  # in the order in which they began
_longest: dict[str, float] = {}  # seconds of the longest wait that has ended, by who waited


@dataclass(slots=True, eq=False)
class Wait:
    """Who waits for whom, since when in the event loop's time; `since` moves whenever `progress` changes."""

    who: str
    whom: Callable[[], str]
    progress: Callable[[], object]
    since: float
    seen: object
    warnings: int = 0
    longest: float = 0.0

    def seconds(self, now: float) -> float:
        """How long nothing has happened. `longest` is the most of it so far."""
        self.longest = max(self.longest, now - self.since)
        if (seen := self.progress()) != self.seen:
            self.seen, self.since, self.warnings = seen, now, 0
        return now - self.since


@contextmanager
def waiting(
    who: str, whom: str | Callable[[], str], progress: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Let the watchdog know that `who` waits for `whom` while the body runs. On the event loop's thread.

    whom: may be worked out when it is shown; empty while there is nothing to wait for. progress: a value that
    changes whenever the wait is getting somewhere.
    """
    now = asyncio.get_running_loop().time
    wait = Wait(who, whom if callable(whom) else lambda: whom, progress, now(), progress())
    _waits[wait] = None
    try:
        yield
    finally:
        del _waits[wait]
        wait.seconds(now())
        _longest[who] = max(_longest.get(who, 0.0), wait.longest)


async def gathered[T](who: str, name: str, calls: Sequence[Awaitable[T]]) -> list[T]:
    """As asyncio.gather. The watchdog names the calls that `who` waits for: `name` 0, `name` 1 and so on."""
    answers = [asyncio.ensure_future(call) for call in calls]

    def silent() -> str:
        return ", ".join(f"{name} {number}" for number, answer in enumerate(answers) if not answer.done())

    with waiting(who, silent, lambda: sum(answer.done() for answer in answers)):
        return await asyncio.gather(*answers)


class Engine(Protocol):
    """An engine as the status shows it."""

    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...


class Pending(Protocol):
    """A request without an answer; `treepo.rollout.driver.PendingRequest` implements it."""

    @property
    def prompt_id(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def engine(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Driver(Protocol):
    """The tree driver, as the watchdog sees it."""

    @property
    def idle(self) -> Any: ...
    @property
    def stats(self) -> Any: ...
    @property
    def waits(self) -> bool: ...
    def pending(self) -> Sequence[Pending]: ...


@contextmanager
def sampling(driver: Driver, engines: Sequence[Engine]) -> Iterator[None]:
    """The driver waits for answers of the engines while the body runs, unless sampling is paused."""

    def whom() -> str:
        return f"an answer: {describe(driver.pending(), engines)}" if waits() else ""

    def waits() -> bool:
        return driver.waits and not driver.idle.paused

    def progress() -> object:
        stats = driver.stats
        return stats.requests, stats.failed_requests, waits()

    with waiting("sampling", whom, progress):
        yield


def describe(pending: Sequence[Pending], engines: Sequence[Engine]) -> str:
    """Each engine's status, its number of unanswered requests, and the oldest of them. Of many engines only
    those whose requests are the oldest.
    """
    of_engine: dict[int, list[Pending]] = {index: [] for index in range(len(engines))}
    for one in pending:
        of_engine[one.engine].append(one)
    shown = range(len(engines))
    if len(engines) > _SHOWN_ENGINES:
        oldest = sorted(shown, key=lambda index: -max((one.seconds for one in of_engine[index]), default=0.0))
        shown = sorted(oldest[:_SHOWN_ENGINES])
    lines = [
        f"{engines[index].name} is {engines[index].status} with {_unanswered(of_engine[index])}"
        for index in shown
    ]
    if len(shown) < len(engines):
        number = len(pending) - sum(len(of_engine[index]) for index in shown)
        lines.append(f"{len(engines) - len(shown)} other engines have {number} unanswered requests")
    return "; ".join(lines)


def _unanswered(pending: Sequence[Pending]) -> str:
    if not pending:
        return "no unanswered requests"
    oldest = max(pending, key=lambda one: one.seconds)
    return (
        f"{len(pending)} unanswered requests, the oldest {oldest.seconds:.0f} s old: request "
        f"{oldest.number} of prompt {oldest.prompt_id}"
    )


class Watchdog:
    """A context manager around a command: looks at all waits, warns, and writes the status into `folder`.

    patience: seconds of a wait before the first warning; where the same has waited longer before, three times
    as long as then. steps: of the run; None for a command without steps. engines: those that the status
    lists. A status that cannot be written is left out: it must not end a run.
    """

    def __init__(self, folder: Path, patience: float, steps: int | None = None) -> None:
        self.engines: Sequence[Engine] = ()
        self._folder, self._patience, self._steps = folder, patience, steps
        self._step, self._metrics = 0, {}
        self._evaluation: tuple[int, Mapping[str, float]] | None = None
        self._pace: Any = None
        self._warnings: Sequence[Any] = ()
        self._phase, self._phase_since = "start", time.time()
        self._writable = True
        self._saving: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        _longest.clear()
        self._write("running")
        self._dumps = stack_dumps(self._folder)
        self._dumps.__enter__()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dumps.__exit__(None, None, None)
        self._task.cancel()
        await asyncio.wait((self._task,))
        if error is None:
            self._write("finished")
        elif isinstance(error, asyncio.CancelledError):
            self._write("interrupted")
        else:
            self._write("failed", _reason(error))

    def phase(self, name: str) -> None:
        """The run enters a phase."""
        self._phase, self._phase_since = name, time.time()

    def step(
        self, step: int, metrics: Mapping[str, float], pace: Any = None, warnings: Sequence[Any] = ()
    ) -> None:
        """A step is finished. pace, warnings: dataclasses that the status shows (`treepo.training.pace`,
        `treepo.training.health`).
        """
        self._step, self._metrics = step, metrics
        self._pace, self._warnings = pace, warnings

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation after a step is finished."""
        self._evaluation = step, metrics

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(TICK_SECONDS, self._patience / 4))
            self.look()
            self._write("running")

    def look(self) -> None:
        """Warn of each wait whose time has come."""
        now = asyncio.get_running_loop().time()
        for wait in list(_waits):
            seconds = wait.seconds(now)
            patience = max(self._patience, 3 * _longest.get(wait.who, 0.0))
            if seconds >= patience * 2**wait.warnings and (whom := wait.whom()):
                wait.warnings += 1
                _log.warning("%s: %s has waited %.0f s for %s", self._phase, wait.who, seconds, whom)

    def _write(self, state: str, reason: str = "") -> None:
        now = asyncio.get_running_loop().time()
        waits = [(wait.who, wait.whom(), wait.seconds(now)) for wait in list(_waits)]
        status = {
            "state": state,
            "reason": reason,
            "step": self._step,
            "steps": self._steps,
            "phase": self._phase,
            "phase_since": self._phase_since,
            "waits": [
                {"who": who, "whom": shortened(whom, 400), "seconds": round(seconds, 1)}
                for who, whom, seconds in sorted(waits, key=lambda wait: -wait[2])
                if whom
            ][:_SHOWN_WAITS],
            "engines": {engine.name: engine.status for engine in self.engines},
            "metrics": _finite(self._metrics),
            "evaluation": None
            if self._evaluation is None
            else {"step": self._evaluation[0], "metrics": _finite(self._evaluation[1])},
            "pace": None if self._pace is None else asdict(self._pace),
            "warnings": [asdict(warning) for warning in self._warnings],
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "host": socket.gethostname(),
            "written": time.time(),
        }
        self._save(
            json.dumps(status, indent=1) + "\n", _LAST_SECONDS if state != "running" else _SAVE_SECONDS
        )

    def _save(self, text: str, seconds: float) -> None:
        """Write the status in a thread, and wait for it for a moment: the disk may not answer."""
        if self._saving is not None and self._saving.is_alive():
            self._saving.join(seconds)
            if self._saving.is_alive():
                return
        self._saving = threading.Thread(target=self._save_now, args=(text,), name="status", daemon=True)
        self._saving.start()
        self._saving.join(seconds)

    def _save_now(self, text: str) -> None:
        try:
            write_file(self._folder / STATUS, text)
            self._writable = True
        except OSError as error:
            if self._writable:
                _log.info("%s: %s; the run goes on without it", error.filename, error.strerror)
            self._writable = False


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """With null for what JSON has no number for."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _reason(error: BaseException) -> str:
    """The first error of a group in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return shortened(one_line(error) or type(error).__name__, 1000)
