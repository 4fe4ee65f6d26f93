"""The files of a training run.

    config.yaml      the effective configuration, overrides applied
    metrics.jsonl    one line for each step, and one for each evaluation
    trees.jsonl      one tree a line (treepo.tree.to_json), with its step and the prompt's gold answer
    heldout_trees.jsonl  the same of each evaluation, with the name of its set, if there are held-out sets
    tensorboard/     the numbers of metrics.jsonl, if `logging` names it
    wandb.json       the W&B run that has them too, mlflow.json the MLflow run
    checkpoints/     training checkpoints, from which --resume continues (treepo.training.checkpoints)
    checkpoint/      a Hugging Face folder of the trained model
    best/            one of the best model, if `evaluation.best` is set
    summary.json     the result of the run
    log.txt          the log

A thread writes whole lines, so the files of a killed run stay readable. Lines that the disk does not take
wait in memory. W&B and MLflow, if `logging` names them, get the same numbers (treepo.training.loggers). A run
that resumes from a checkpoint first truncates its files to their sizes at that checkpoint: no step and no
tree appears twice.
"""

import asyncio
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from treepo.config.load import dump_config
from treepo.config.run import RunConfig
from treepo.data.background_writer import BackgroundWriter, BufferedFile
from treepo.data.daemon_thread import in_thread
from treepo.data.folder_lock import locked
from treepo.data.output_folder import (
    CONFIG,
    HELDOUT_TREES,
    LOG,
    SUMMARY,
    TREES,
    log_to,
    prepare_folder,
    set_aside,
    write_file,
)
from treepo.errors import ConfigError, DataError, one_line, shown
from treepo.training.checkpoints import discard_leftovers
from treepo.training.disk_wait import DiskWait
from treepo.training.event_file import event_file_name, first_event, scalars_event
from treepo.training.loggers.run_loggers import Decode, RunLoggers
from treepo.training.run_state import RunState
from treepo.training.tree_supply import FinishedTree
from treepo.tree import Tree, to_json

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
CHECKPOINT, BEST = "checkpoint", "best"
_SLOW_SECONDS = 30.0  # that lines may wait before the run does
_MOST_EVENTS = 2**26  # bytes for TensorBoard that may wait


class RunFolder:
    """A context manager around a run's files, which no other command can write meanwhile.

    A new run moves an earlier run's files into `previous-N/`; nothing is overwritten. If `state` is given,
    the run in the folder continues from it. Its methods never block the event loop, however slow the disk.
    decode: makes text of tokens, for loggers with tables.
    """

    def __init__(
        self, config: RunConfig, state: RunState | None = None, decode: Decode | None = None
    ) -> None:
        self.path = config.out
        self.checkpoint = config.out / CHECKPOINT
        self.best = config.out / BEST
        self.disk = DiskWait(config.disk_seconds)
        self._config, self._state = config, state
        self._loggers = RunLoggers(config, METRICS, decode)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            if self._state is None:
                prepare_folder(self.path, self._config)
            else:
                try:
                    self._truncate(self._state)
                except OSError as error:
                    raise ConfigError(f"out: {error.filename}: {error.strerror}") from None
            stack.enter_context(log_to(self.path / LOG))
            self._files = stack.enter_context(ExitStack())
            stack.enter_context(self._loggers)
            self._open_files()
            self._stack = stack.pop_all()
        return self

    def go_back(self, state: RunState) -> None:
        """Go back to an earlier state of this run, as a resumed run does, and go on writing from there.

        Blocks. Raises OSError, and can be called again then.
        """
        self._files.close()
        self._truncate(state)
        self._open_files()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _open_files(self) -> None:
        names = (METRICS, TREES, *([HELDOUT_TREES] if self._config.heldout_sets else []))
        self._growing = {name: BufferedFile(self.path / name) for name in names}
        self._metrics, self._trees = self._growing[METRICS], self._growing[TREES]
        self._events: BufferedFile | None = None
        if TENSORBOARD in self._config.logging:
            events = self.path / TENSORBOARD / event_file_name()
            self._events = BufferedFile(events, limit=_MOST_EVENTS, durable=False)
            self._events.add(first_event())
        for file in self._growing.values():
            file.open()
        step = 0
        for record in read_metrics(self.path / METRICS):
            self._plot(record)
            step = record["step"]
        self._metrics_size = self._metrics.size
        self._loggers.begin(step, self._metrics_size)
        needed, wait_seconds = tuple(self._growing.values()), self._config.disk_seconds
        others = () if self._events is None else (self._events,)
        self._writer = self._files.enter_context(BackgroundWriter(needed, others, wait_seconds))
        self._writer.wake()

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's numbers; a number that is not finite is null, because JSON has no nan."""
        record = {"step": step, "time": time.time()} | {
            name: value if math.isfinite(value) else None for name, value in metrics.items()
        }
        line = json.dumps(record).encode() + b"\n"
        self._metrics.add(line)
        self._plot(record)
        self._metrics_size += len(line)
        self._loggers.metrics(record, self._metrics_size)
        self._writer.wake()

    def recorded(self) -> Iterator[dict[str, float | None]]:
        """What metrics.jsonl holds on the disk, in its order."""
        return read_metrics(self.path / METRICS)

    def _plot(self, record: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        values = {name: value for name, value in record.items() if name not in ("step", "time")}
        self._events.add(scalars_event(record["step"], record["time"], values))

    def write_tree(self, tree: Tree, step: int, answer: str) -> None:
        """Write one graded tree."""
        self._trees.add(to_json(tree, routes=self._config.save_routes, step=step, answer=answer))
        self._loggers.tree(tree, step, answer)
        self._writer.wake()

    async def write_evaluation(self, trees: Mapping[str, Sequence[FinishedTree]], step: int) -> None:
        """Write the graded trees of each held-out set, by its name. Others run between two of them."""
        for name, finished_trees in trees.items():
            for finished in finished_trees:
                line = to_json(finished.tree, step=step, set=name, answer=finished.answer)
                self._growing[HELDOUT_TREES].add(line)
                self._writer.wake()
                await asyncio.sleep(0)

    async def keeps_up(self) -> None:
        """Return at once if the disk takes what is written; else wait until it does. Raises DiskError."""
        late = time.monotonic() - _SLOW_SECONDS
        for file in self._growing.values():
            if file.failure is not None or (file.waiting and file.waiting_since < late):
                await self.sizes()
                return

    async def sizes(self) -> dict[str, int]:
        """Wait until all lines are on the disk, and return the files' sizes in bytes. Raises DiskError."""
        await self.disk.until_written(list(self._growing.values()))
        return {name: file.size for name, file in self._growing.items()}

    async def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write the result of a finished run, after all its lines. Raises DiskError."""
        self._loggers.summary(summary)
        await self.sizes()
        path, text = self.path / SUMMARY, json.dumps(summary, indent=2) + "\n"
        await self.disk.until_done(lambda: in_thread(lambda: write_file(path, text)), str(path))

    def _truncate(self, state: RunState) -> None:
        """Truncate the files to their sizes at `state`, and set aside a finished run's models and summary.

        Raises OSError, and can be called again then.
        """
        folder = self.path
        discard_leftovers(folder, state.steps_done)
        results = (CHECKPOINT, BEST, SUMMARY)
        set_aside(folder, [folder / name for name in results if (folder / name).exists()])
        sizes = dict(state.sizes)
        if (folder / HELDOUT_TREES).exists():
            sizes.setdefault(HELDOUT_TREES, 0)  # a checkpoint of an earlier version does not name it
        for name, size in sizes.items():
            os.truncate(folder / name, size)
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)  # written again from the metrics
        write_file(folder / CONFIG, dump_config(self._config))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl. Raises DataError for a line that no run has written."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        yield metrics_record(line, f"{path}:{number}")


def metrics_record(line: bytes, place: str) -> dict[str, Any]:
    """A line of metrics.jsonl. place: its file and number. Raises DataError if no run has written it."""
    try:
        record = orjson.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {one_line(error)}") from None
    if not _is_metrics(record):
        raise DataError(f"{place}: not the numbers of a step: {shown(record)}")
    return record


def _is_metrics(record: object) -> bool:
    """Whether a record has a step, a time, and numbers or null by name."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    return record.get("time") is not None and all(
        _is_number(value) for value in record.values() if value is not None
    )


def _is_number(value: object) -> bool:
    """Whether TensorBoard can write it: a float, or an integer of 64 bits."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)
