"""The loggers of a run that have a server, W&B and MLflow, each fed beside the run (`feed`)."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from treepo.config.loggers import TablesConfig
from treepo.config.run import RunConfig
from treepo.training.loggers.feed import Feed, Message
from treepo.training.loggers.logger import State
from treepo.training.loggers.secret_text import values_without_secrets
from treepo.training.loggers.tree_table import COLUMNS, SampledTree, rows_of
from treepo.tree import Tree

Decode = Callable[[np.ndarray], str]
SERVERS = ("wandb", "mlflow")
"""The names in `logging` that have a process."""
_END_SECONDS: dict[State, float] = {"finished": 30.0, "failed": 10.0, "stopped": 5.0}  # to log what waits
_BYTES_OF_NUMBER, _BYTES_OF_TOKEN = 40, 8  # in a message, about


class RunLoggers:
    """A context manager around a run. metrics: the name of the file that has its numbers. decode: makes text
    of tokens; None: no tables.

    No method waits, except the exit, which lets the loggers take what waits for a bounded time.
    """

    def __init__(self, config: RunConfig, metrics: str, decode: Decode | None) -> None:
        self._config, self._metrics, self._decode = config, metrics, decode
        self._feeds: dict[str, Feed] = {}
        self._sampled: dict[str, list[SampledTree]] = {}  # of the step that is next

    def __enter__(self) -> Self:
        config = self._config
        names = [name for name in SERVERS if name in config.logging]
        whole = values_without_secrets(config.model_dump(mode="json")) if names else {}
        for name in names:
            self._sampled[name] = []
            self._feeds[name] = Feed(
                name,
                {
                    "folder": str(config.out.resolve()),
                    "metrics": self._metrics,
                    "options": whole[name],
                    "config": whole,
                    "pid": os.getpid(),
                },
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state = _state(error)
        for feed in self._feeds.values():
            feed.finish(state)
        deadline = time.monotonic() + _END_SECONDS[state]
        for feed in self._feeds.values():
            feed.wait(max(deadline - time.monotonic(), 0))

    def begin(self, step: int, size: int) -> None:
        """Begin, or go back to `step`. size: bytes of the file of numbers, whose last step it is."""
        for name, feed in self._feeds.items():
            self._sampled[name].clear()
            begin = _begin(step, size)
            feed.add(Message(lambda begin=begin: begin, 0, after=begin))
            feed.add(Message(lambda: {"kind": "config"}, 0))

    def metrics(self, record: Mapping[str, Any], size: int) -> None:
        """Log a line of the file of numbers, whose size it makes `size`."""
        step: int = record["step"]
        message = Message(
            lambda: {"kind": "metrics", "record": record},
            _BYTES_OF_NUMBER * len(record),
            after=_begin(step, size),
        )
        for name, feed in self._feeds.items():
            feed.add(message)
            sampled = [one for one in self._sampled[name] if one.step == step]
            if sampled:
                self._sampled[name] = []
                feed.add(self._table(step, sampled))

    def tree(self, tree: Tree, step: int, answer: str) -> None:
        """Log one graded tree with the numbers of its step, if it is one for the table."""
        for name, sampled in self._sampled.items():
            options: TablesConfig = getattr(self._config, name)
            every = options.table_every
            if every is None or self._decode is None or (step != 1 and step % every):
                continue
            if len(sampled) < options.table_trees:
                sampled.append(SampledTree(tree, step, answer))

    def summary(self, summary: Mapping[str, object]) -> None:
        """Log the result of a finished run."""
        for feed in self._feeds.values():
            feed.add(Message(lambda: {"kind": "summary", "values": summary}, 0))

    def _table(self, step: int, sampled: list[SampledTree]) -> Message:
        decode = self._decode
        assert decode is not None

        def make() -> dict[str, Any]:  # in the feed's thread: long answers take a while
            return {"kind": "table", "step": step, "columns": COLUMNS, "rows": rows_of(sampled, decode)}

        tokens = sum(one.tree.total_tokens() + len(one.tree.prompt) for one in sampled)
        return Message(make, _BYTES_OF_TOKEN * tokens)


def _begin(step: int, size: int) -> dict[str, Any]:
    return {"kind": "begin", "step": step, "size": size}


def _state(error: BaseException | None) -> State:
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, asyncio.CancelledError | KeyboardInterrupt) else "failed"
