"""The process of a logger without a server, which notes what it is told in `calls.jsonl` of the run folder.

Its options say what it does at a step, once: {"die": 3, "hang": 5}. "broken" makes it fail at its start.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treepo.training.loggers import process
from treepo.training.loggers.logger import LoggedRun, State, Tell


class NotingLogger:
    """A `Logger`."""

    def __init__(self, run: LoggedRun, tell: Tell) -> None:
        self._folder, self._options = run.folder, run.options
        if "broken" in run.options:
            raise ImportError("no module named wandb, with token-1234567890")
        tell("ready", warn=False)

    def begin(self, step: int) -> int:
        self._note("begin", step)
        return step

    def config(self) -> None:
        self._note("config")

    def metrics(self, step: int, seconds: float, values: Mapping[str, float | None]) -> None:
        del seconds
        self._misbehave(step)
        self._note("metrics", step, dict(values))

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._note("table", step, list(columns), list(rows))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._note("summary", dict(values))

    def end(self, state: State) -> None:
        self._note("end", state)

    def passes(self, error: Exception) -> bool:
        return isinstance(error, OSError)

    def _misbehave(self, step: int) -> None:
        for how in ("die", "hang"):
            mark = self._folder / f"{how}-{step}"
            if self._options.get(how) == step and not mark.exists():
                mark.touch()
                if how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600)

    def _note(self, *call: object) -> None:
        with (self._folder / "calls.jsonl").open("a") as file:
            file.write(json.dumps(call) + "\n")


def calls_of(folder: Path) -> list[Any]:
    """What a logger noted."""
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    process.CLASSES["noting"] = ("tests.support.logger_process", "NotingLogger")
    process.main(sys.argv[1], int(sys.argv[2]))
