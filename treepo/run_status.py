"""Reads the status that the watchdog of a run writes, and tells whether the run is alive."""

import json
import socket
import time
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from treepo.errors import DataError, one_line
from treepo.watchdog import STATUS, TICK_SECONDS

_OLD_SECONDS = 12 * TICK_SECONDS


class WaitStatus(BaseModel):
    """Who waits for whom, and for how many seconds when the status was written."""

    who: str
    whom: str
    seconds: float


class PaceStatus(BaseModel):
    """How fast the run goes; see `treepo.training.pace.Pace`."""

    step_seconds: float
    change: float | None
    left_seconds: float


class WarningStatus(BaseModel):
    """A health warning; see `treepo.training.health.HealthWarning`."""

    rule: str
    step: int
    text: str


class EvaluationStatus(BaseModel):
    """What the last evaluation found, after a step; 0: before training."""

    step: int
    metrics: dict[str, float | None]


class RunStatus(BaseModel):
    """The content of status.json. Times are in seconds since 1970."""

    model_config = ConfigDict(extra="ignore")

    state: Literal["running", "finished", "interrupted", "failed"]
    reason: str
    step: int
    steps: int | None
    phase: str
    phase_since: float
    waits: list[WaitStatus]
    engines: dict[str, str]
    metrics: dict[str, float | None]
    evaluation: EvaluationStatus | None = None
    pace: PaceStatus | None = None
    warnings: list[WarningStatus] = []
    pid: int
    process_started: float
    host: str
    written: float

    def age(self) -> float:
        """Seconds since the status was written."""
        return max(time.time() - self.written, 0.0)

    def fault(self) -> str:
        """Why a run that has not ended does not go on; empty if it does, or has ended."""
        if self.state != "running":
            return ""
        if self.host == socket.gethostname() and not self._process_lives():
            return f"its process {self.pid} is gone, {self.age():.0f} s or less after the last sign of life"
        if self.age() > _OLD_SECONDS:
            return (
                f"its last sign of life is {self.age():.0f} s old: process {self.pid} on {self.host} is "
                "stopped, stuck or gone, or cannot write into the folder"
            )
        return ""

    def _process_lives(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.process_started) < 1
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False


def read_status(folder: Path) -> RunStatus:
    """The status in a run's folder. Raises DataError if there is none."""
    path = folder / STATUS
    try:
        content: Any = json.loads(path.read_bytes())
        return RunStatus.model_validate(content)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; a run writes it once it has begun") from None
    except (ValidationError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not the status of a run: {one_line(error)}") from None
