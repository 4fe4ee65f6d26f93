"""Folders as runs leave them, with chosen numbers and without an engine or a trainer."""

import json
from pathlib import Path
from typing import Any

from tests.support.small_trees import tree_of
from treepo.tree import to_json

STATUS: dict[str, Any] = {
    "state": "finished",
    "reason": "",
    "step": 2,
    "steps": 2,
    "phase": "stop",
    "phase_since": 1000.0,
    "waits": [{"who": "step 3", "whom": "trees of prompts 7, 8", "seconds": 2.0}],
    "engines": {"engine 0": "serving"},
    "metrics": {},
    "pid": 1,
    "process_started": 900.0,
    "host": "elsewhere",
    "written": 1000.0,
}
LOG = """\
2026-01-02 03:04:05,000 INFO treepo.training.train: train.jsonl: 8 of 8 rows usable
2026-01-02 03:04:06,500 WARNING treepo.cluster.engine_pool: engine 0 is restarted: it died
2026-01-02 03:04:07,000 ERROR treepo.data.output_folder: the run ended early
Traceback (most recent call last):
ValueError: no
2026-01-02 03:05:00,000 INFO treepo.training.train: continues after step 1
"""


def step(number: int, **metrics: float | None) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    seconds = {"seconds/sample": 3.0, "seconds/train": 2.0, "seconds/step": 6.0}
    return {"step": number, "time": 1000.0 + 10 * number, "reward": number / 10, **seconds, **metrics}


def write_run_folder(
    folder: Path, steps: int = 2, *, config: str = "seed: 1\n", log: str = LOG, **status: Any
) -> Path:
    """A run of so many steps with one tree each, and an evaluation after the first."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [step(number, accuracy=number / steps) for number in range(1, steps + 1)]
    lines.insert(1, {"step": 1, "time": 1015.0, "heldout/accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(config)
    (folder / "log.txt").write_text(log)
    (folder / "status.json").write_text(json.dumps(STATUS | status))
    (folder / "summary.json").write_text(json.dumps({"steps": steps, "phase_seconds": {"train": 4.0}}))
    trees = [
        to_json(tree_of([-1, 0, 0], [0.0, 1.0]), step=number, answer="2") for number in range(1, steps + 1)
    ]
    (folder / "trees.jsonl").write_bytes(b"".join(trees))
    return folder
