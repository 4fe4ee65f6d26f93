"""The process of one logger: does what the run tells it by lines of JSON, and answers each when it is done.

    python -P -m treepo.training.loggers.process NAME PARENT

The library of a logger has threads, exit handlers, processes and lines for the terminal; here they disturb
nobody. A server that is down is tried until it answers. The process ends with the run's.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from treepo.errors import one_line, shortened
from treepo.training.loggers.logger import LoggedRun, Logger, MakeLogger
from treepo.training.loggers.secret_text import without_secrets

CLASSES = {
    "wandb": ("treepo.training.loggers.wandb_logger", "WandbLogger"),
    "mlflow": ("treepo.training.loggers.mlflow_logger", "MlflowLogger"),
}
"""The loggers that run here: module and class."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts
_END_SECONDS = 5.0  # to end after the run's process is gone
_DEFAULTS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder as `tracking_uri`
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the loop below tries again, and says so
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "WANDB_ERROR_REPORTING": "false",
}


@dataclass(slots=True)
class Dispatcher:
    """Does what the lines of a run say, and answers.

    metrics: the run's metrics.jsonl. answers: where each line has its answer, after lines for the run's log.
    refused: the kinds of messages of which one was refused; that is told once.
    """

    metrics: Path
    answers: BinaryIO
    refused: set[str] = field(default_factory=set)

    def tell(self, text: str, *, warn: bool = True) -> None:
        """Put a line into the log of the run."""
        self._answer({"warning" if warn else "info": _in_log(text)})

    def give_up(self, text: str) -> None:
        """Say that this logger cannot log anything."""
        self._answer({"given_up": _in_log(text)})

    def follow(self, logger: Logger, lines: Iterable[bytes]) -> bool:
        """Do what each line says. Returns whether the last one has come."""
        for line in lines:
            message = json.loads(line)
            self._persist(logger, message)
            self._answer({"done": True})
            if message["kind"] == "end":
                return True
        return False

    def _persist(self, logger: Logger, message: dict[str, Any]) -> None:
        """Do it, and try again for as long as that can help. Nothing can be logged without a beginning."""
        pause, told = _FIRST_PAUSE, ""
        while True:
            try:
                self._do(logger, message)
            except Exception as error:  # whatever a library raises
                reason = shortened(one_line(error), 300).rstrip(". ") or type(error).__name__
                tries_again = message["kind"] == "begin" or logger.passes(error)
                if not tries_again:
                    self._tell_refusal(message["kind"], reason)
                    return
                if reason != told:
                    self._answer({"trouble": _in_log(f"{reason}; it is tried again, and the run goes on")})
                told = reason
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if told:
                    self.tell("it answers again", warn=False)
                return

    def _tell_refusal(self, kind: str, reason: str) -> None:
        if kind not in self.refused:
            self.tell(f"{reason}; the {kind} is left out, and the run goes on")
        self.refused.add(kind)

    def _do(self, logger: Logger, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "begin":
                self._begin(logger, message["step"], message["size"])
            case "config":
                logger.config()
            case "metrics":
                _log(logger, message["record"])
            case "table":
                logger.table(message["step"], message["columns"], message["rows"])
            case "summary":
                logger.summary(message["values"])
            case "end":
                logger.end(message["state"])

    def _begin(self, logger: Logger, step: int, size: int) -> None:
        """Begin after `step`, whose numbers are in the first `size` bytes of metrics.jsonl."""
        last = logger.begin(step)
        for record in _records(self.metrics, size):
            if last < record["step"] <= step:
                _log(logger, record)

    def _answer(self, content: dict[str, Any]) -> None:
        self.answers.write(json.dumps(content).encode() + b"\n")
        self.answers.flush()


def _in_log(text: str) -> str:
    return shortened(without_secrets(one_line(text)), 600)


def _log(logger: Logger, record: dict[str, Any]) -> None:
    values = {name: value for name, value in record.items() if name not in ("step", "time")}
    logger.metrics(record["step"], record["time"], values)


def _records(path: Path, size: int) -> Iterator[dict[str, Any]]:
    if size:
        with path.open("rb") as file:
            yield from map(json.loads, file.read(size).splitlines())


def main(name: str, parent: int) -> None:
    lines, answers = _private_streams()
    _end_with(parent)
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    logger: Logger | None = None
    try:
        opening = json.loads(lines.readline())
        folder = Path(opening["folder"])
        dispatcher = Dispatcher(folder / opening["metrics"], answers)
        run = LoggedRun(folder, opening["options"], opening["config"], opening["pid"])
        try:
            logger = _class_of(name)(run, dispatcher.tell)
        except Exception as error:  # an installation that is broken in whatever way
            dispatcher.give_up(f"{type(error).__name__}: {error}")
            return
        if dispatcher.follow(logger, lines):
            return
    except BrokenPipeError:
        pass
    with suppress(Exception):  # the run's process is gone, so nobody is told
        if logger is not None:
            logger.end("stopped")


def _class_of(name: str) -> MakeLogger:
    module, made = CLASSES[name]
    return getattr(importlib.import_module(module), made)


def _private_streams() -> tuple[BinaryIO, BinaryIO]:
    """The run's lines and the way back, on descriptors of their own; libraries read and show nothing."""
    lines, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    return lines, answers


def _end_with(parent: int) -> None:
    """End within seconds once the parent has, whatever hangs. Signals to the run's processes are its own."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(_END_SECONDS)
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
