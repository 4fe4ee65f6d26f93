"""Whether anything grows during a long run: a quickstart of many steps, with its processes watched from
outside. JSON lines: one for each quantity of each role, then one for all.

    python -m benchmarks.soak --steps 300 --mode async [KEY=VALUE ...]

A line has the quantity's mean, its slope a hundred steps, and the slope's standard error. The slope is that
of the lowest values of twelve equal parts of the run, because memory rises and falls with every checkpoint: a
leak raises what is left. A quantity is flat if over the whole run it grows by less than `--percent` of its
mean, or by less than three standard errors.
The first fifth of the run does not count: caches fill, and Ray starts its spare workers. The run is flat only
if every quantity was measured, Ray's objects too; one with fewer than three samples is `unmeasured`.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.chaos import sandbox, scene
from benchmarks.chaos.roles import role_of
from benchmarks.chaos.strike import step_metrics

_EVERY_SECONDS = 2.0
_RAY_EVERY = 15  # samples: asking Ray takes seconds of a core
_WARM_UP = 0.2
_STANDARD_ERRORS = 3.0
_FEWEST = 3  # samples of a line with a slope
_PARTS = 12  # of a run; each has a few checkpoints
_RAY_OBJECTS = ("ray", "objects")
_UNITS = {"memory": "MiB", "files": "open files", "threads": "threads", "processes": "processes"}
_ROLES = ("driver", "engine", "scheduler", "trainer", "grader", "worker", "raylet", "gcs")

type Series = dict[tuple[str, str], list[tuple[float, float]]]
"""Step and value of each sample, by role and quantity."""


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line through a series. per_step, error: the slope and its standard error."""

    mean: float
    per_step: float
    error: float
    steps: float

    @classmethod
    def of(cls, series: Sequence[tuple[float, float]]) -> "Slope":
        """Least squares over (step, value). A series of fewer than three samples has no slope."""
        if len(series) < _FEWEST:
            return cls(float(np.mean([value for _, value in series] or [0.0])), 0.0, 0.0, 0.0)
        step, value = np.array(series, dtype=float).T
        away = step - step.mean()
        spread = float(away @ away)
        if spread == 0:
            return cls(float(value.mean()), 0.0, 0.0, 0.0)
        per_step = float(away @ (value - value.mean())) / spread
        rest = value - value.mean() - per_step * away
        error = float(np.sqrt(rest @ rest / (len(series) - 2) / spread))
        return cls(float(value.mean()), per_step, error, float(step.max() - step.min()))

    def flat(self, percent: float) -> bool:
        """Whether it grows by less than this share of its mean over the run, or by less than its noise."""
        growth = self.per_step * self.steps
        return growth <= max(abs(self.mean) * percent / 100, _STANDARD_ERRORS * self.error * self.steps)


def counted(series: Sequence[tuple[float, float]], steps: int) -> list[tuple[float, float]]:
    """The samples after the warm-up and before the last step, after which the processes end."""
    return [(step, value) for step, value in series if _WARM_UP * steps <= step < steps]


def lowest(series: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The sample with the lowest value of each part, if there are enough."""
    if len(series) < 2 * _PARTS:
        return list(series)
    parts = np.array_split(np.array(series, dtype=float), _PARTS)
    return [tuple(part[part[:, 1].argmin()]) for part in parts]


def lines(series: Series, steps: int, percent: float) -> Iterator[dict[str, Any]]:
    """A line for each series."""
    for (role, quantity), samples in sorted(series.items()):
        of_run = counted(samples, steps)
        slope = Slope.of(lowest(of_run))
        yield {
            "role": role,
            "quantity": quantity,
            "mean": round(float(np.mean([value for _, value in of_run] or [0.0])), 3),
            "slope_per_100_steps": round(100 * slope.per_step, 4),
            "standard_error": round(100 * slope.error, 4),
            "samples": len(of_run),
            "flat": slope.flat(percent),
        }


def verdict(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the lines of all series: whether the run is flat, what grows, and what was not measured."""
    names = [f"{line['role']}: {line['quantity']}" for line in found]
    growing = [name for name, line in zip(names, found, strict=True) if not line["flat"]]
    unmeasured = [name for name, line in zip(names, found, strict=True) if line["samples"] < _FEWEST]
    unmeasured += [name for name in [": ".join(_RAY_OBJECTS)] if name not in names]
    return {"flat": not growing and not unmeasured, "growing": growing, "unmeasured": unmeasured}


def sample() -> dict[tuple[str, str], float]:
    """Memory that no other process shares, open files and threads of all processes of a role; files and
    bytes of /tmp and /dev/shm.
    """
    found: dict[tuple[str, str], float] = defaultdict(float)
    for process in sandbox.processes():
        with suppress(psutil.Error):
            role = role_of(process)
            role = "other" if role not in _ROLES else role
            with process.oneshot():
                memory = process.memory_info()
                numbers = {
                    "memory": (memory.rss - memory.shared) / 2**20,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                    "processes": 1,
                }
            for name, number in numbers.items():
                found[role, _UNITS[name]] += number
    for folder in (sandbox.TEMPORARY, sandbox.SHARED_MEMORY):
        usage = shutil.disk_usage(folder)
        found[str(folder), "MiB"] = usage.used / 2**20
        found[str(folder), "entries"] = sum(1 for _ in folder.rglob("*"))
    return dict(found)


def ray_objects() -> dict[tuple[str, str], float]:
    """Objects in Ray's store, as `ray memory` counts them; nothing if it does not answer."""
    addresses = [
        argument.partition("=")[2]
        for process in sandbox.processes()
        for argument in _arguments(process)
        if argument.startswith("--gcs-address=")
    ]
    if not addresses:
        return {}
    program = [sys.executable, "-m", "ray.scripts.scripts", "memory", "--stats-only", "--address"]
    # Without this Ray's command replaces a loopback address by another one, at which nothing listens.
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = subprocess.run(
        [*program, addresses[0]], env=environment, capture_output=True, text=True, check=False
    )
    match = re.search(r"Plasma memory usage (\d+) MiB, (\d+) objects", done.stdout)
    if match is None:
        return {}
    return {("ray", "MiB of objects"): float(match[1]), _RAY_OBJECTS: float(match[2])}


def _arguments(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def filled(samples: Sequence[tuple[float, Mapping[tuple[str, str], float]]]) -> Series:
    """A series for each key that occurs. A sample without it has none of it: a process that has ended."""
    keys = {key for _, taken in samples for key in taken}
    return {key: [(step, taken.get(key, 0.0)) for step, taken in samples] for key in keys}


def watch(driver: "subprocess.Popen[bytes]", run: Path) -> Series:
    """Sample until the driver ends."""
    samples, of_ray = [], []
    while driver.poll() is None:
        sandbox.reap({driver.pid})
        metrics = step_metrics(run)
        if metrics:
            step = metrics[-1]["step"]
            if len(samples) % _RAY_EVERY == 0 and (objects := ray_objects()):
                of_ray.append((step, objects))
            samples.append((step, sample()))
        time.sleep(_EVERY_SECONDS)
    series = filled(samples) | filled(of_ray)
    series["run", "seconds/step"] = [(line["step"], line["seconds/step"]) for line in step_metrics(run)]
    return series


def inside(folder: Path, steps: int, mode: str, percent: float, overrides: Sequence[str]) -> int:
    """Run and watch, in a sandbox; returns the exit code of the benchmark."""
    sandbox.enter(folder)
    run = folder / mode
    split = ["placement=split", "loop.mode=async"] if mode == "async" else []
    settings = [f"out={run}", f"steps={steps}", "log_prob_check.enabled=false", *split, *overrides]
    # Otherwise the driver makes a token that nobody else knows, and `ray memory` needs it.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    program = [sys.executable, "-c", "from treepo.cli.main import main; main()", "train"]
    with (folder / f"{mode}.txt").open("wb") as output:
        driver = subprocess.Popen(
            [*program, "examples/quickstart.yaml", *settings],
            cwd=scene.ROOT,
            env=scene.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        series = watch(driver, run)
    found = list(lines(series, steps, percent))
    for line in found:
        _print({"mode": mode} | line)
    ended = driver.returncode == 0 and len(series["run", "seconds/step"]) == steps
    outcome = verdict(found)
    _print({"mode": mode, "steps": steps, "ended": ended} | outcome)
    return int(not (ended and outcome["flat"]))


def _print(line: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mode", choices=("sync", "async"), default="sync")
    parser.add_argument("--percent", type=float, default=2.0, help="growth over the run that counts as none")
    parser.add_argument("--work", type=Path, default=Path("runs/soak"), help="folder of the run")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    folder = arguments.work.absolute()
    if arguments.inside:
        return inside(folder, arguments.steps, arguments.mode, arguments.percent, arguments.overrides)
    folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "benchmarks.soak", "--inside", *sys.argv[1:]]
    return subprocess.run(sandbox.command(program), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
