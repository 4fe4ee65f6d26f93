"""Runs cases in sandboxes, and keeps the inputs and the undisturbed run that they share."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.chaos import sandbox, scene
from benchmarks.chaos.faults import Fault

UNDISTURBED = Fault("driver", "KILL", "never", "sync", "colocated", 0.0)
_LONGEST_SECONDS = 1800.0  # a case ends itself long before


class Workshop:
    """The folder of a benchmark: inputs/, undisturbed/, and a folder for each case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = folder / "inputs"
        self.inputs.mkdir(parents=True, exist_ok=True)
        scene.write_inputs(self.inputs)

    def run(self, fault: Fault, folder: Path) -> dict[str, Any]:
        """Run a case in its folder, after the undisturbed run that it is compared with."""
        return self._run(fault, folder, self.undisturbed())

    def run_alone(self, fault: Fault, folder: Path) -> dict[str, Any]:
        """Run a case whose weights are compared with nothing."""
        return self._run(fault, folder, Path("nothing"))

    def undisturbed(self) -> Path:
        """The run folder of a run without a fault."""
        folder = self.folder / "undisturbed"
        if not (folder / "run" / "summary.json").exists():
            line = self.run_alone(UNDISTURBED, folder)
            if line["ends"] != [0]:
                raise RuntimeError(f"a run without a fault does not end well: {json.dumps(line)}")
            if not line["ok"]:
                sys.stderr.write(f"even without a fault: {json.dumps(line)}\n")
        return folder / "run"

    def _run(self, fault: Fault, folder: Path, reference: Path) -> dict[str, Any]:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        arguments = [json.dumps(fault.as_json()), str(folder), str(self.inputs), str(reference)]
        program = [sys.executable, "-m", "benchmarks.chaos.trial", *arguments]
        done = subprocess.run(
            sandbox.command(program),
            cwd=scene.ROOT,
            env=scene.environment(),
            stdout=subprocess.PIPE,
            timeout=_LONGEST_SECONDS,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])
