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
    "node",
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
_HANDLED_INSIDE = frozenset({"engine", "scheduler", "trainer", "grader"})
_TERMINATED = 143


@dataclass(frozen=True, slots=True)
class Fault:
    """Send `signal` to `process` in `phase` of a step.

    process: one of PROCESSES. `node`: all processes of the second of two nodes, where `treepo launch` starts
    again. `everything`: all of the run's processes. `disk`: the file system of the run folder has no room
    left, until some seconds later. moment: how far into the phase, from 0 to 1.
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
    transports = ("broadcast", "disk") if process == "node" else TRANSPORTS
    loop = str(rng.choice(("sync", "sync", "async")))
    return Fault(
        process=process,
        signal=str(signal),  # type: ignore[reportArgumentType]  numpy's own text
        phase=phase,
        loop=loop,
        transport=str(rng.choice(transports)),
        moment=round(float(rng.random()), 3),
    )


def check_ends(fault: Fault, struck: bool, ends: list[int]) -> list[str]:
    """What is wrong with the exit codes of a case's starts, one line each.

    Between its start and its shutdown a run replaces an engine, a rank or a grader by itself. SIGTERM ends it
    with 143, unless it was complete.
    """
    if not struck:
        return [] if ends == [0] else [f"without a fault the exit codes were {ends}"]
    inside = fault.process in _HANDLED_INSIDE and fault.phase not in ("start", "shutdown")
    if inside and ends[0] != 0:
        return [f"the run did not go on by itself: exit code {ends[0]}"]
    if (fault.process, fault.signal) == ("driver", "TERM") and ends[0] not in (0, _TERMINATED):
        return [f"SIGTERM ended the run with exit code {ends[0]}"]
    return []
