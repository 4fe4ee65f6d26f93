"""Kills everything of one run N times: each kill's next checkpoint must equal the undisturbed run's."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos import sandbox, scene
from benchmarks.chaos.cases import Workshop

_STEPS_PER_KILL = 3


def run(workshop: Workshop, kills: int, seed: int) -> int:
    """Print a line for each kill and one for all. Returns 1 unless all were equal."""
    steps = _STEPS_PER_KILL * kills
    undisturbed = workshop.folder / f"undisturbed-{steps}"
    if not (undisturbed / "run" / "summary.json").exists():
        list(_drill(workshop, 0, seed, steps, undisturbed))
    equal = 0
    for line in _drill(workshop, kills, seed, steps, workshop.folder / "killed", undisturbed / "run"):
        sys.stdout.write(json.dumps({"seed": seed} | line) + "\n")
        sys.stdout.flush()
        equal += line["equal"]
    sys.stdout.write(json.dumps({"seed": seed, "equal": equal, "of": kills}) + "\n")
    return int(equal < kills)


def _drill(
    workshop: Workshop, kills: int, seed: int, steps: int, folder: Path, *reference: Path
) -> Iterator[dict[str, Any]]:
    """The lines of a drill in a sandbox, as they come."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    arguments = map(str, (kills, seed, steps, folder, workshop.inputs, *reference))
    program = [sys.executable, "-m", "benchmarks.chaos.drill", *arguments]
    command = sandbox.command(program)
    with subprocess.Popen(
        command, cwd=scene.ROOT, env=scene.environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise RuntimeError(f"the drill in {folder} ended with exit code {process.returncode}")
