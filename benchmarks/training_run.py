"""One `treepo train` of a benchmark, in processes of its own and a folder that is removed afterwards."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

COMMAND = (sys.executable, "-c", "from treepo.cli.main import main; main()")
"""The program `treepo` of this environment; its arguments follow."""


def train(config: str, overrides: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train with one thread for each process. Returns the lines of metrics.jsonl, and the run's summary."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run(
            [*COMMAND, "train", config, *overrides, f"out={out}"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (out / "metrics.jsonl").read_bytes().splitlines()
        return [orjson.loads(line) for line in lines], orjson.loads((out / "summary.json").read_bytes())
