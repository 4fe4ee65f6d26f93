"""The exceptions that a user sees; the command line shows each as one line."""

import logging
import re
from typing import ClassVar

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # colors, and moves of the cursor
EXIT_INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""

# What a terminal obeys instead of showing: C0, DEL, C1, Unicode's own line ends and changes of direction.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_MOST_CHARACTERS = 2000  # of a line of an error


class TreepoError(Exception):
    """Base of all errors that end a command with one clear line: the place, and what is allowed.

    exit_code: of the command; 2 for bad input, 1 for a failure during the run.
    """

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        """The text for a terminal or log, whatever names and values it quotes."""
        lines = printable(super().__str__()).split("\n")
        return "\n".join(
            shortened(line, _MOST_CHARACTERS) if len(line) > _MOST_CHARACTERS else line for line in lines
        )


class ConfigError(TreepoError):
    """A key, type or combination in a configuration that cannot be used."""


class DataError(TreepoError):
    """A data file, row or column that cannot be used; the text names file and line."""


class ModelError(TreepoError):
    """A model folder that cannot be used; the text names the folder and what is missing."""


class EngineError(TreepoError):
    """A request that an engine could not serve; the text names the engine and the reason."""

    exit_code = 1


class DeadEngineError(EngineError):
    """An engine that no longer answers."""


class NoEngineError(TreepoError):
    """No engine is left to sample with; the text says why each was lost."""

    exit_code = 1


class LogProbCheckError(TreepoError):
    """Trainer and engine disagree on log-probs; the text has the figures and likely causes."""

    exit_code = 1


class TrainerError(TreepoError):
    """A trainer that cannot go on; the text names the rank and the reason."""

    exit_code = 1


class LostTrainerError(TrainerError):
    """A trainer rank that died or hangs, so that the group must be started again; the text names it."""


class TrainerMemoryError(TrainerError):
    """A trainer rank that ran out of memory and would again; the text has the numbers and names the keys."""

    exit_code = 2


class ActorError(TreepoError):
    """An error in an engine or trainer rank that nobody expected; the text has its type and message, and the
    log its traceback.
    """

    exit_code = 1


class DivergedError(TreepoError):
    """Training that a restart would repeat: steps without a finite gradient, or that ruin the weights. The
    text has the figures, and what to change.
    """


class PlacementError(TreepoError):
    """A layout that does not fit the cluster; the text compares its needs with the cluster's resources."""


class AllocationError(TreepoError):
    """Missing or contradictory variables that describe the nodes; the text lists them with their sources."""


class ClusterError(TreepoError):
    """A Ray cluster that does not start, or no longer answers; the text says what is missing."""

    exit_code = 1


class LostJobError(ClusterError):
    """A training that ended without an exit code, as when its Ray died; it can be started again."""


class StoppedJobError(ClusterError):
    """A training that somebody stopped, as with `ray job stop`."""

    exit_code = EXIT_INTERRUPTED


class RewardError(TreepoError):
    """Grading that cannot continue; the text gives the reason."""

    exit_code = 1


class TransportError(EngineError):
    """Weights that did not reach an engine; sender or engine may be at fault."""


class WeightsRefusedError(TreepoError):
    """Weights that an engine refuses again after a restart; the text has the engine's reason."""

    exit_code = 1


class CheckpointError(TreepoError):
    """A checkpoint or model that could not be written; the text names the folder and the reason."""

    exit_code = 1


class DiskError(TreepoError):
    """A run folder that could not be written for too long, or was deleted; the text names file and reason."""

    exit_code = 1


def printable(text: str) -> str:
    """The text with a replacement character for each one that a terminal obeys, except tab and newline."""
    return _UNPRINTABLE.sub("\ufffd", text)


def without_colors(text: str) -> str:
    """The text without a terminal's control sequences, which other libraries put into their messages."""
    return _CONTROL.sub("", text)


class PrintableFormatter(logging.Formatter):
    """Formats a record, and its traceback, as printable text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def one_line(message: object) -> str:
    """Join the lines of a message, such as another library's exception, into one without colors."""
    return " ".join(without_colors(str(message)).split())


def shortened(text: str, most: int = 120) -> str:
    """The text in one line of about `most` characters, its middle left out if it is longer."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 4 :]}"
    return one_line(text)


def shown(value: object) -> str:
    """The value as it is written in Python, shortened."""
    return shortened(repr(value))
