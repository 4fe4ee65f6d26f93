"""Waits for the drawn moment of a run, as its own files tell it, and sends the fault.

A step writes its trees, then learns, then writes its metrics: the seconds that the step before has written
there say when within a step its log-probs, training and update are due.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.roles import of_role, role_of
from benchmarks.chaos.sandbox import processes
from benchmarks.chaos.scene import PROMPTS, STEPS

STRUCK_STEP = 3
_POLL = 0.004
_START_WINDOW, _SHUTDOWN_WINDOW, _CHECKPOINT_WINDOW, _EVALUATION_WINDOW = 12.0, 3.0, 0.15, 0.5
_SIGNALS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP, "TERM": signal.SIGTERM}


class RunEndedError(Exception):
    """The run ended before the moment came."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the files of a run say: finished steps, trees written, whether a checkpoint is being written."""

    steps: int
    trees: int
    writes_checkpoint: bool
    exports: bool

    @classmethod
    def of(cls, run: Path) -> "Progress":
        return cls(
            steps=len(step_metrics(run)),
            trees=_content(run / "trees.jsonl").count(b"\n"),
            writes_checkpoint=any((run / "checkpoints").glob(".step-*")),
            exports=(run / "checkpoint").exists(),
        )

    @property
    def phase(self) -> str:
        """The phase that these files show, as far as they tell it."""
        if self.exports:
            return "shutdown"
        if self.trees == 0 and self.steps == 0:
            return "start or sampling"
        learns = self.trees >= PROMPTS * (self.steps + 1)
        return ("learning" if learns else "sampling") + (" and checkpoint" if self.writes_checkpoint else "")


def step_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of the steps so far; half a line at the end is left out."""
    lines = _content(run / "metrics.jsonl").split(b"\n")[:-1]
    records = [orjson.loads(line) for line in lines]
    return [record for record in records if "seconds/step" in record]


def _content(path: Path) -> bytes:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def wait_for_moment(fault: Fault, run: Path, alive: Callable[[], bool]) -> list[psutil.Process]:
    """Return the processes to strike, at the moment to strike them. Raises RunEndedError."""

    def wait(condition: Callable[[], Any]) -> Any:
        while not (value := condition()):
            if not alive():
                raise RunEndedError
            time.sleep(_POLL)
        return value

    seconds = _delay(fault, run, wait)
    end = time.monotonic() + seconds
    wait(lambda: time.monotonic() >= end)
    if fault.process == "disk":
        return []
    return wait(lambda: _targets(fault))


def _delay(fault: Fault, run: Path, wait: Callable[[Callable[[], Any]], Any]) -> float:
    """Wait until the phase of the fault begins; returns how many seconds later its moment is."""
    match fault.phase:
        case "start":
            wait(lambda: fault.process == "disk" or _targets(fault))
            return fault.moment * _START_WINDOW
        case "never":
            wait(lambda: False)
        case "grading":
            wait(lambda: Progress.of(run).steps >= STRUCK_STEP - 1)
            wait(_grading)
            return 0.0
        case "checkpoint":
            wait(lambda: Progress.of(run).steps >= STRUCK_STEP - 1 and Progress.of(run).writes_checkpoint)
            return fault.moment * _CHECKPOINT_WINDOW
        case "evaluation":
            wait(lambda: Progress.of(run).steps >= STRUCK_STEP)
            return fault.moment * _EVALUATION_WINDOW
        case "shutdown":
            wait(lambda: (run / "checkpoint").exists() or len(step_metrics(run)) == STEPS)
            return fault.moment * _SHUTDOWN_WINDOW
    wait(lambda: len(step_metrics(run)) >= STRUCK_STEP - 1)
    past = step_metrics(run)[STRUCK_STEP - 2]
    names = ("sample", "log_probs", "train", "weight_sync")
    sample, log_probs, train, sync = (past[f"seconds/{name}"] for name in names)
    if fault.phase == "sampling":
        return fault.moment * sample
    wait(lambda: Progress.of(run).trees >= PROMPTS * STRUCK_STEP)
    return {
        "log-probs": fault.moment * log_probs,
        "training": log_probs + fault.moment * train,
        "update": log_probs + train + fault.moment * sync,
    }[fault.phase]


def _targets(fault: Fault) -> list[psutil.Process]:
    """The processes to strike: one of the role, drawn by the fault's moment, or all that belong together."""
    found = sorted(of_role(fault.process, processes()), key=lambda process: process.pid)
    if fault.process in ("everything", "node") or not found:
        return found
    return [found[int(np.random.default_rng(round(fault.moment * 1000)).integers(len(found)))]]


def _grading() -> bool:
    """Whether a grading process computes: it waits for its next response otherwise."""
    graders = of_role("grader", processes())
    with suppress(psutil.Error):
        return any(grader.status() == psutil.STATUS_RUNNING for grader in graders)
    return False


def send(name: str, targets: Sequence[psutil.Process]) -> list[str]:
    """Send the signal to each process; returns their roles."""
    roles = [role_of(target) or target.name() for target in targets]
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            os.kill(target.pid, _SIGNALS[name])
    return roles


def wake(targets: Sequence[psutil.Process]) -> None:
    """Let stopped processes go on."""
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.send_signal(signal.SIGCONT)
