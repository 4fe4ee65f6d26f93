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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboard.summary import Writer

from treepo.config.base import Section
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
    earlier = [entry for entry in folder.iterdir() if entry.name.startswith(_PREVIOUS)]
    files = [entry for entry in folder.iterdir() if entry not in earlier]
    if not files:
        return
    if folder / CONFIG not in files:
        raise ConfigError(f"out: {folder} has files in it, but not of a run ({CONFIG} is missing)")
    aside = folder / f"{_PREVIOUS}{len(earlier) + 1}"
    aside.mkdir()
    for entry in files:
        entry.rename(aside / entry.name)


class RunFolder:
    """A context manager. An earlier run's files are moved into `previous-N/`, never overwritten."""

    def __init__(self, config: RunConfig) -> None:
        self.path = config.out
        self.checkpoint = config.out / CHECKPOINT
        self._config = config

    def __enter__(self) -> Self:
        prepare_folder(self.path, self._config)
        self._stack = ExitStack()
        self._metrics = self._stack.enter_context((self.path / METRICS).open("w"))
        self._trees = self._stack.enter_context((self.path / TREES).open("wb"))
        self._tensorboard = Writer(str(self.path / TENSORBOARD))
        self._stack.callback(self._tensorboard.close)
        self._stack.enter_context(log_to(self.path / LOG))
        return self

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
