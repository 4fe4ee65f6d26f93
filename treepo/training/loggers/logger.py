"""What a logger with a server does; each runs in a process of its own (`treepo.training.loggers.process`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

NO_STEP = -1
"""The last step of a server that has none: an evaluation before training is of step 0."""
State = Literal["finished", "failed", "stopped"]
"""How a run ended; `stopped`: by a signal, or because its process is gone."""


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """The run that is logged.

    folder: absolute. options: the logger's section of the configuration. config: the whole configuration.
    pid: the run's process.
    """

    folder: Path
    options: Mapping[str, Any]
    config: Mapping[str, Any]
    pid: int


class Logger(Protocol):
    """One method at a time, in the order of the run. A method may block and raise whatever its library does.

    Steps grow, except after `begin`. Values are finite or None.
    """

    def begin(self, step: int) -> int:
        """Begin the run, or go on with it after `step`, whatever was logged before.

        Returns the last step that the server has, at most `step`, or NO_STEP; the steps from there follow
        again.
        """
        ...

    def config(self) -> None:
        """Log the configuration, after `begin`."""
        ...

    def metrics(self, step: int, seconds: float, values: Mapping[str, float | None]) -> None:
        """Log numbers of a step, which may have come with others before. seconds: Unix time."""
        ...

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table of sampled answers."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the result of a run that is complete."""
        ...

    def end(self, state: State) -> None:
        """End, once all is logged."""
        ...

    def passes(self, error: Exception) -> bool:
        """Whether the same call may succeed later, as with a server that is down."""
        ...


class Tell(Protocol):
    """Puts a line into the log of the run."""

    def __call__(self, text: str, *, warn: bool = True) -> None: ...


MakeLogger = Callable[[LoggedRun, Tell], Logger]


def flat(values: Mapping[str, Any], prefix: str = "", dot: str = ".") -> dict[str, Any]:
    """Nested values by dotted name."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}{dot}", dot)
        else:
            result[f"{prefix}{name}"] = value
    return result
