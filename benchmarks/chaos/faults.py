"""What can go wrong, and the fault of each case: a pure function of seed and number."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

type Signal = Literal["KILL", "STOP", "TERM", "FULL"]

TRANSPORTS = ("colocated", "broadcast", "disk", "host_broadcast")
PROCESSES = (
    "driver",
    "engine",
    "scheduler",
    "trainer",
    "grader",
    "worker",
    "raylet",
    "gcs",
    "everything",
    "disk",
)
PHASES = (
    "start",
    "sampling",
    "grading",
    "log-probs",
    "training",
    "update",
    "checkpoint",
    "evaluation",
    "shutdown",
)
HANDLED_INSIDE = frozenset({"engine", "scheduler", "trainer", "grader"})
"""Processes that a run replaces by itself between its start and its shutdown."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Send `signal` to `process` in `phase` of a step.

    process: one of PROCESSES. `everything`: all of the run's processes. `disk`: the file system of the run
    folder has no room left, until some seconds later. moment: how far into the phase, from 0 to 1.
    """

    process: str
    signal: Signal
    phase: str
    loop: str
    transport: str
    moment: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def draw(seed: int, case: int) -> Fault:
    """The fault of a case. Each call draws from a generator of its own, so a case can be run alone."""
    rng = np.random.default_rng([seed, case])
    process = str(rng.choice(PROCESSES))
    phase = str(rng.choice(PHASES))
    signals: dict[str, tuple[Signal, ...]] = {"disk": ("FULL",), "everything": ("KILL",)}
    signal: Signal = rng.choice(signals.get(process, ("KILL", "KILL", "STOP", "TERM")))
    loop = str(rng.choice(("sync", "sync", "async")))
    return Fault(
        process=process,
        signal=str(signal),  # type: ignore[reportArgumentType]  numpy's own text
        phase=phase,
        loop=loop,
        transport=str(rng.choice(TRANSPORTS)),
        moment=round(float(rng.random()), 3),
    )
