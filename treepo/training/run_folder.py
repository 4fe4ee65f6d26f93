"""The files of a training run.

    config.yaml      the effective configuration, overrides applied
    metrics.jsonl    one line for each step
    trees.jsonl      one tree a line (treepo.tree.to_json), with its step and the prompt's gold answer
    tensorboard/     the numbers of metrics.jsonl
    checkpoints/     training checkpoints, from which --resume continues (treepo.training.checkpoints)
    checkpoint/      a Hugging Face folder of the trained model
    summary.json     the result of the run
    log.txt          the log

Every line is flushed as it is written, so the files of a killed run stay readable. A run that resumes from a
checkpoint first truncates its files to their sizes at that checkpoint: no step and no tree appears twice.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from tensorboard.summary import Writer

from treepo.config.load import dump_config
from treepo.config.run import RunConfig
from treepo.data.output_folder import CONFIG, LOG, SUMMARY, TREES, log_to, prepare_folder, set_aside
from treepo.errors import ConfigError
from treepo.training.checkpoints import discard_leftovers
from treepo.training.run_state import RunState
from treepo.tree import Tree, to_json

METRICS, CHECKPOINT, TENSORBOARD = "metrics.jsonl", "checkpoint", "tensorboard"


class RunFolder:
    """A context manager around a run's files.

    A new run moves an earlier run's files into `previous-N/`; nothing is overwritten. If `state` is given,
    the run in the folder continues from it.
    """

    def __init__(self, config: RunConfig, state: RunState | None = None) -> None:
        self.path = config.out
        self.checkpoint = config.out / CHECKPOINT
        self._config, self._state = config, state

    def __enter__(self) -> Self:
        if self._state is None:
            prepare_folder(self.path, self._config)
        else:
            self._go_back(self._state)
        self._stack = ExitStack()
        self._metrics = self._stack.enter_context((self.path / METRICS).open("ab"))
        self._trees = self._stack.enter_context((self.path / TREES).open("ab"))
        self._tensorboard = Writer(str(self.path / TENSORBOARD))
        self._stack.callback(self._tensorboard.close)
        self._stack.enter_context(log_to(self.path / LOG))
        for line in (self.path / METRICS).read_bytes().splitlines():
            self._plot(json.loads(line))
        return self

    def sizes(self) -> dict[str, int]:
        """Wait until the growing files are on disk, and return their sizes in bytes."""
        for file in (self._metrics, self._trees):
            os.fsync(file.fileno())
        return {METRICS: self._metrics.tell(), TREES: self._trees.tell()}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's numbers; a number that is not finite is null, because JSON has no nan."""
        record = {"step": step, "time": time.time()} | {
            name: value if math.isfinite(value) else None for name, value in metrics.items()
        }
        self._metrics.write(json.dumps(record).encode() + b"\n")
        self._metrics.flush()
        self._plot(record)

    def _plot(self, record: dict[str, float | None]) -> None:
        step, wall_time = record.pop("step"), record.pop("time")
        for name, value in record.items():
            self._tensorboard.add_scalar(
                name, math.nan if value is None else value, step, wall_time=wall_time
            )
        self._tensorboard.flush()

    def write_tree(self, tree: Tree, step: int, answer: str) -> None:
        """Write one graded tree."""
        self._trees.write(to_json(tree, step=step, answer=answer))
        self._trees.flush()

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write the result of a finished run."""
        (self.path / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")

    def _go_back(self, state: RunState) -> None:
        """Truncate the files to their sizes at `state`, and set aside a finished run's model and summary."""
        folder = self.path
        try:
            discard_leftovers(folder)
            set_aside(folder, [folder / name for name in (CHECKPOINT, SUMMARY) if (folder / name).exists()])
            for name, size in state.sizes.items():
                os.truncate(folder / name, size)
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)  # written again from the metrics
            (folder / CONFIG).write_text(dump_config(self._config))
        except OSError as error:
            raise ConfigError(f"out: {error.filename}: {error.strerror}") from None
