"""One case of benchmarks/chaos that no other test covers, with real processes."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.chaos import sandbox
from benchmarks.chaos.cases import Workshop
from benchmarks.chaos.faults import Fault

pytestmark = pytest.mark.slow


def test_all_processes_are_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The run goes on from the checkpoint before, trains every prompt once and leaves nothing behind."""
    allowed = subprocess.run(sandbox.command(["true"]), capture_output=True, text=True, check=False)
    if allowed.returncode:
        pytest.skip(f"this machine allows no namespaces: {allowed.stderr.strip()}")
    workshop = Workshop(tmp_path)
    fault = Fault("everything", "KILL", "checkpoint", "sync", "disk", 0.3)
    line = workshop.run_alone(fault, tmp_path / "case")
    assert line["ends"] == [-9, 0], line
    assert line["ok"], line
