"""Where a run's numbers go besides its own files, and what each such logger is told.

A key that is null leaves the choice to the logger's own environment variables and defaults.
"""

from typing import Literal

from pydantic import Field

from treepo.config.base import Section

LoggerName = Literal["tensorboard", "wandb", "mlflow", "jsonl"]


class TablesConfig(Section):
    """What loggers with tables have in common."""

    table_every: int | None = Field(default=10, ge=1)
    """Steps between tables of sampled answers: the first step, then every so many; null: none."""
    table_trees: int = Field(default=2, ge=1)
    """Trees in a table; each of their leaves is a row."""


class WandbConfig(TablesConfig):
    project: str | None = None
    """The project; null: WANDB_PROJECT, else `treepo`."""
    entity: str | None = None
    """The user or team; null: WANDB_ENTITY, else your default entity."""
    name: str | None = None
    """The run's name; null: WANDB_NAME, else the name of the run folder."""
    group: str | None = None
    """The group that the run belongs to; null: WANDB_RUN_GROUP, else none."""
    tags: list[str] = Field(default=[])
    """The run's tags; empty: WANDB_TAGS."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """`offline` writes into the run folder, for `wandb sync`; null: WANDB_MODE, else `online`. A run that
    cannot reach the server is logged offline."""


class MlflowConfig(TablesConfig):
    tracking_uri: str | None = Field(default=None, pattern=r"^[^\s@]+$")
    """A tracking server, database or folder; null: MLFLOW_TRACKING_URI, else MLflow's default. A URI with a
    name and a password is refused, because it is in the run's files: use MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD."""
    experiment: str | None = None
    """The experiment; null: MLFLOW_EXPERIMENT_NAME, else `treepo`."""
    name: str | None = None
    """The run's name; null: MLFLOW_RUN_NAME, else the name of the run folder."""
    tags: dict[str, str] = Field(default={})
    """The run's tags."""
