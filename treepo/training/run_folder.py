"""The files of a run: everything that it leaves, and the names they have.

    config.yaml      the effective configuration, overrides applied
    metrics.jsonl    one line a step
    trees.jsonl      one tree a line (treepo.tree.to_json), with its step and the prompt's gold answer
    tensorboard/     the same numbers as metrics.jsonl
    checkpoints/     training checkpoints, from which --resume goes on (treepo.training.checkpoints)
    checkpoint/      a Hugging Face folder of the trained model
    summary.json     what the run came to
    log.txt          what it said on the way

Lines are flushed as they are written, so what a killed run has written stays readable. A run that goes on
from a checkpoint cuts them back to what they were then: no step and no tree is there twice.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboard.summary import Writer

from treepo.config.base import Section
from treepo.config.load import dump_config
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.training.checkpoints import RunState, discard_leftovers
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


def prepare_folder(folder: Path, config: Section) -> None:
    """Make the folder, move an earlier run's files into `previous-N/`, write the configuration.

    Raises ConfigError where that cannot be done, and for a folder that holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _set_aside_previous(folder)
        (folder / CONFIG).write_text(dump_config(config))
    except OSError as error:
        raise ConfigError(f"out: {error.filename}: {error.strerror}") from None


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """What our own packages log while the block runs, and what ended it early."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("treepo", "sglang_rollout")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # on the screen nothing below a warning appears all the same
    try:
        yield
    except BaseException:
        logging.getLogger(__name__).exception("the run ended early")
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()


def _set_aside_previous(folder: Path) -> None:
    files = [entry for entry in folder.iterdir() if not entry.name.startswith(_PREVIOUS)]
    if files and folder / CONFIG not in files:
        raise ConfigError(f"out: {folder} has files in it, but not of a run ({CONFIG} is missing)")
    _set_aside(folder, files)


def _set_aside(folder: Path, files: Sequence[Path]) -> None:
    """Move them into the next `previous-N/`, where there are any."""
    if not files:
        return
    earlier = sum(entry.name.startswith(_PREVIOUS) for entry in folder.iterdir())
    aside = folder / f"{_PREVIOUS}{earlier + 1}"
    aside.mkdir()
    for entry in files:
        entry.rename(aside / entry.name)


def _go_back(folder: Path, state: RunState, config: Section) -> None:
    """Make the folder what it was after `state.step`; an end that the run had come to is set aside."""
    try:
        discard_leftovers(folder)
        _set_aside(folder, [folder / name for name in (CHECKPOINT, SUMMARY) if (folder / name).exists()])
        for name, size in state.sizes.items():
            os.truncate(folder / name, size)
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)  # it is written again from the metrics
        (folder / CONFIG).write_text(dump_config(config))
    except OSError as error:
        raise ConfigError(f"out: {error.filename}: {error.strerror}") from None


class RunFolder:
    """A context manager. An earlier run's files are moved into `previous-N/`, never overwritten; with a
    `state` the run in the folder goes on from there.
    """

    def __init__(self, config: RunConfig, state: RunState | None = None) -> None:
        self.path = config.out
        self.checkpoint = config.out / CHECKPOINT
        self._config, self._state = config, state

    def __enter__(self) -> Self:
        if self._state is None:
            prepare_folder(self.path, self._config)
        else:
            _go_back(self.path, self._state, self._config)
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
        """Bytes of the files that grow, all of them on the disk."""
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
        """One step's numbers; what is not finite is null in the file, as JSON has no nan."""
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
        """One graded tree."""
        self._trees.write(to_json(tree, step=step, answer=answer))
        self._trees.flush()

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Written once, by a finished run."""
        (self.path / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
