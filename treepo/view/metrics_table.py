"""Reads metrics.jsonl as columns, also while a run writes it."""

from pathlib import Path
from typing import Any

from treepo.training.run_folder import metrics_record

_KEYS = ("step", "time")


def metrics_table(path: Path) -> dict[str, Any]:
    """The steps in order, the Unix seconds of each, and the columns: one number or None a step, by metric.

    An evaluation after a step is in the step's row. An incomplete last line is left out, and a file that is
    not there has no steps. Raises DataError for a line that no run has written.
    """
    rows: dict[int, dict[str, float | None]] = {}
    for record in _records(path):
        row = rows.setdefault(record["step"], {"time": record["time"]})
        row |= {name: value for name, value in record.items() if name not in _KEYS}
    steps = sorted(rows)
    names = dict.fromkeys(name for step in steps for name in rows[step] if name not in _KEYS)
    return {
        "steps": steps,
        "times": [rows[step]["time"] for step in steps],
        "columns": {name: [rows[step].get(name) for step in steps] for name in names},
    }


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline: nothing, or half a line
    return [metrics_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
