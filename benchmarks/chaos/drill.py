"""One run that is killed again and again, with everything that it started. Runs inside a sandbox."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.chaos import sandbox, scene
from benchmarks.chaos.strike import Progress
from treepo.training.checkpoints import CHECKPOINTS, newest

_LIMIT_SECONDS = 2 * scene.START_SECONDS  # for a start to reach its moment
_START_SHARE, _START_SECONDS = 0.2, 25.0
_MOST_STEPS, _STEP_SECONDS = 2, 2.0
# Of the engine, whose batches compose themselves by chance: no state of the trainer.
_ROUNDING = "run.max_logprob_difference"


class Drill:
    """A run of `steps` steps in `folder`. reference: an undisturbed run's folder; None: this is that run."""

    def __init__(self, folder: Path, inputs: Path, steps: int, reference: Path | None) -> None:
        self._folder, self._out, self._reference = folder, folder / "run", reference
        config = scene.config_of(inputs, self._out, steps=steps)
        config["checkpoint"]["keep"] = None if reference is None else 2
        self._config = scene.write_config(folder, config)
        self._starts = 0

    def kill(self, rng: np.random.Generator) -> dict[str, Any]:
        """Start or resume the run and kill everything at a drawn moment, in the start or some steps later.
        Returns when, and the step of the newest checkpoint.
        """
        began, done = time.monotonic(), self.step()
        driver = self._start()
        steps = 0 if rng.random() < _START_SHARE else int(rng.integers(1, _MOST_STEPS + 1))
        while self.step() < done + steps:
            self._check(driver, began)
        end = time.monotonic() + rng.uniform(0, _STEP_SECONDS if steps else _START_SECONDS)
        while time.monotonic() < end:
            self._check(driver, began)
        shown = Progress.of(self._out).phase
        for process in sandbox.processes():
            with suppress(psutil.NoSuchProcess):  # it has ended with another one
                process.kill()
        driver.wait()
        while sandbox.processes():
            sandbox.reap()
            time.sleep(0.05)
        return {"after_seconds": round(time.monotonic() - began, 1), "phase": shown, "at_step": self.step()}

    def finish(self) -> None:
        """Resume to the end. Raises RuntimeError if it is not reached."""
        driver = self._start()
        while driver.poll() is None:
            sandbox.reap({driver.pid})
            time.sleep(0.1)
        if driver.returncode != 0:
            raise RuntimeError(f"start {self._starts} ended with exit code {driver.returncode}")

    def step(self) -> int:
        """The step of the newest checkpoint."""
        names = (each.name for each in (self._out / CHECKPOINTS).glob("step-*"))
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def differences(self) -> list[str]:
        """What differs between the newest checkpoint and the undisturbed run's of the same step."""
        from benchmarks.chaos.checkpoint_equality import differences  # here: it imports Megatron-Core

        found = newest(self._out)
        assert found is not None
        assert self._reference is not None
        lines = differences(self._reference / CHECKPOINTS / found[0].name, found[0])
        return [line for line in lines if not line.startswith(_ROUNDING)]

    def _start(self) -> "subprocess.Popen[bytes]":
        self._starts += 1
        command = scene.train_command(self._config, resume=self._starts > 1)
        return scene.start(command, self._folder / f"start-{self._starts}.txt")

    def _check(self, driver: "subprocess.Popen[bytes]", began: float) -> None:
        """Wait a moment. Raises RuntimeError if the run has ended or does not get on."""
        time.sleep(0.01)
        sandbox.reap({driver.pid})
        if driver.poll() is not None:
            raise RuntimeError(f"start {self._starts} ended with exit code {driver.returncode} by itself")
        if time.monotonic() > began + _LIMIT_SECONDS:
            raise RuntimeError(f"start {self._starts} has not come to its moment")


def judge(drill: Drill, waiting: list[dict[str, Any]]) -> None:
    """Print a line for each kill after which the run has written a checkpoint; keep the others."""
    step = drill.step()
    judged = [kill for kill in waiting if kill["at_step"] < step]
    if not judged:
        return
    found = drill.differences()
    for kill in judged:
        line = kill | {"judged_at_step": step, "equal": not found, "differences": found[:5]}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        waiting.remove(kill)


def main() -> None:
    """Arguments: number of kills, seed, steps, folder, inputs, the undisturbed run if there is one."""
    kills, seed, steps, folder, inputs, *reference = sys.argv[1:]
    sandbox.enter(Path(inputs).parent)
    drill = Drill(Path(folder), Path(inputs), int(steps), Path(reference[0]) if reference else None)
    rng = np.random.default_rng(int(seed))
    waiting: list[dict[str, Any]] = []
    for number in range(1, int(kills) + 1):
        waiting.append({"kill": number} | drill.kill(rng))
        judge(drill, waiting)
    drill.finish()
    judge(drill, waiting)


if __name__ == "__main__":
    main()
