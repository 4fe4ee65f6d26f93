"""Evaluation in a training run: how often, on which held-out sets, how sampled, and which step is the best.

`data.heldout` is one set, named "heldout", with the options of `evaluation`. `evaluation.sets` has further
ones, each with its own file, columns and options.
"""

import re
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from treepo.config.base import PathField, Section
from treepo.config.data import ColumnsConfig
from treepo.errors import shown

HELDOUT = "heldout"
"""The name of the set in `data.heldout`."""


class HeldoutOptions(Section):
    """How a held-out set is sampled."""

    samples: int = Field(default=1, ge=1)
    """Sequential samples of each held-out prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens, as few as have this probability together."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from this many of the likeliest tokens; null: from all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Sample from the tokens with at least this fraction of the likeliest token's probability."""
    max_response_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in one response; null: `sampling.max_response_tokens`."""
    max_problems: int | None = Field(default=None, ge=1)
    """Use only the first N held-out problems; all by default."""

    @model_validator(mode="after")
    def _greedy_once(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"temperature = 0 gives the same response every time, but samples = {self.samples} asks for "
                "several; set samples = 1"
            )
        return self


class HeldoutSetConfig(HeldoutOptions):
    """A set of held-out problems. An option that is not given is that of `evaluation`."""

    path: PathField
    """Problems: a .jsonl or .parquet file, a folder of them, or one saved by `datasets`."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names of `path`; by default those of `data.heldout_columns`."""


class HeldoutConfig(HeldoutOptions):
    """`samples` to `max_problems` are of `data.heldout`, and the defaults of every set in `sets`."""

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the held-out sets during training; null: only before and after it."""
    sets: dict[str, HeldoutSetConfig] = Field(default={})
    """Further held-out sets by name, each evaluated whenever `data.heldout` is. The accuracy of the set
    `math` is the metric `heldout/math/accuracy`."""
    best: str | None = None
    """Keep the checkpoint with the best accuracy besides the newest ones, and write its model to `best/` at
    the end. `accuracy` is that of `data.heldout` or of the only set, `math/accuracy` that of the set `math`.
    Needs `every`; each step that is evaluated then has a checkpoint, whatever `checkpoint.every` says."""

    @model_validator(mode="before")
    @classmethod
    def _sets_begin_with_these_options(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("sets"), dict):
            return value
        given = {key: value[key] for key in HeldoutOptions.model_fields if key in value}
        try:
            HeldoutOptions.model_validate(given)
        except ValidationError:
            return value  # a mistake in them is reported once
        sets = {name: given | one if isinstance(one, dict) else one for name, one in value["sets"].items()}
        return value | {"sets": sets}

    @field_validator("sets")
    @classmethod
    def _names_are_of_metrics(cls, sets: dict[str, HeldoutSetConfig]) -> dict[str, HeldoutSetConfig]:
        for name in sets:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{shown(name)} is no name of a set: letters, digits, _ and - are allowed")
            if name == HELDOUT:
                raise ValueError(f"{HELDOUT!r} is the set in data.heldout; give this one another name")
        return sets

    @field_validator("best")
    @classmethod
    def _best_is_an_accuracy(cls, best: str | None) -> str | None:
        if best is not None and best.rpartition("/")[2] != "accuracy":
            raise ValueError(
                f"should be accuracy, or NAME/accuracy with the name of a set, found {shown(best)}"
            )
        return best

    @model_validator(mode="after")
    def _best_is_evaluated(self) -> Self:
        if self.best is not None and self.every is None:
            raise ValueError(
                f"best = {self.best} with every = null: there is an accuracy before and after training only; "
                "set every"
            )
        return self
