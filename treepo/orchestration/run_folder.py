"""The files of a run: everything that it leaves, and the names they have.

    config.yaml      the effective configuration, overrides applied
    metrics.jsonl    one line a step
    trees.jsonl      one tree a line (treepo.tree.to_json), with its step and the prompt's gold answer
    tensorboard/     the same numbers as metrics.jsonl
    checkpoint/      a Hugging Face folder of the trained model
    summary.json     what the run came to
    log.txt          what it said on the way

Lines are flushed as they are written, so what a killed run has written stays readable.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from tensorboard.summary import Writer

from treepo.config.load import dump_config
from treepo.config.schema import RunConfig
from treepo.errors import ConfigError
from treepo.tree import Tree, to_json

CONFIG, METRICS, TREES, SUMMARY, LOG = (
    "config.yaml",
    "metrics.jsonl",
    "trees.jsonl",
    "summary.json",
    "log.txt",
)
CHECKPOINT, TENSORBOARD = "checkpoint", "tensorboard"
_PREVIOUS = "previous-"


class RunFolder:
    """A context manager. An earlier run's files are moved into `previous-N/`, never overwritten."""

    def __init__(self, config: RunConfig) -> None:
        self.path = config.out
        self.checkpoint = config.out / CHECKPOINT
        self._config = config

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._set_aside_previous()
            (self.path / CONFIG).write_text(dump_config(self._config))
            self._metrics = (self.path / METRICS).open("w")
            self._trees = (self.path / TREES).open("wb")
        except OSError as error:
            raise ConfigError(f"out: {error.filename}: {error.strerror}") from None
        self._tensorboard = Writer(str(self.path / TENSORBOARD))
        self._log = logging.FileHandler(self.path / LOG)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("treepo").addHandler(self._log)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            logging.getLogger("treepo").error("the run ended early", exc_info=error)
        logging.getLogger("treepo").removeHandler(self._log)
        self._log.close()
        self._tensorboard.close()
        self._trees.close()
        self._metrics.close()

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's numbers; what is not finite is null in the file, as JSON has no nan."""
        record = {"step": step, "time": time.time()} | {
            name: value if math.isfinite(value) else None for name, value in metrics.items()
        }
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def write_tree(self, tree: Tree, step: int, answer: str) -> None:
        """One graded tree."""
        self._trees.write(to_json(tree, step=step, answer=answer))
        self._trees.flush()

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Written once, by a finished run."""
        (self.path / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")

    def _set_aside_previous(self) -> None:
        earlier = [entry for entry in self.path.iterdir() if entry.name.startswith(_PREVIOUS)]
        files = [entry for entry in self.path.iterdir() if entry not in earlier]
        if not files:
            return
        if self.path / CONFIG not in files:
            raise ConfigError(f"out: {self.path} has files in it, but not of a run ({CONFIG} is missing)")
        aside = self.path / f"{_PREVIOUS}{len(earlier) + 1}"
        aside.mkdir()
        for entry in files:
            entry.rename(aside / entry.name)
