"""The exceptions that a user sees: the command line shows each as one line."""

from typing import ClassVar

EXIT_INTERRUPTED = 130
"""Of a command that Ctrl-C ended."""


class TreepoError(Exception):
    """Base of every error that ends in one clear line; its text names the place and what is allowed.

    exit_code: of the command that it ends; 2 for what the user gave it, 1 for what broke on the way.
    """

    exit_code: ClassVar[int] = 2


class ConfigError(TreepoError):
    """A key, type or combination in a configuration that cannot be used."""


class DataError(TreepoError):
    """A data file, row or column that cannot be used; the text names file and line."""


class ModelError(TreepoError):
    """A model folder that cannot be used; the text names the folder and what it lacks."""


class EngineError(TreepoError):
    """A request that an engine could not serve; the text names the engine and the reason."""

    exit_code = 1


class DeadEngineError(EngineError):
    """An engine that can answer nothing any more."""


class NoEngineError(TreepoError):
    """No engine is left to sample with; the text says what became of each."""

    exit_code = 1


class LogProbCheckError(TreepoError):
    """Trainer and engine disagree on log-probs; the text has the figures and the usual suspects."""

    exit_code = 1


class TrainerError(TreepoError):
    """A rank of the trainer that is gone; the text names it."""

    exit_code = 1


class PlacementError(TreepoError):
    """A layout that the cluster cannot hold; the text says what is needed and what is there."""


class AllocationError(TreepoError):
    """Nodes of which too little or too much is said; the text has what was found where."""


class ClusterError(TreepoError):
    """A Ray cluster that does not come about or is gone; the text says what is missing."""

    exit_code = 1


class RewardError(TreepoError):
    """Grading that cannot go on; the text says why."""

    exit_code = 1


class TransportError(EngineError):
    """Weights that did not reach an engine; it says nothing of who is at fault."""


class CheckpointError(TreepoError):
    """A checkpoint or model that could not be written; the text names the folder and the reason."""

    exit_code = 1
