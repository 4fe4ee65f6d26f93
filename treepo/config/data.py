"""Prompts: their files, and the columns that hold them."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from treepo.config.base import PathField, Section, unknown_name
from treepo.errors import shown

_SHIPPED = Path(__file__).parents[1] / "data/columns"
_LONGEST_CYCLE = 1_000_000  # positions after which a mixture's order repeats


def shipped_columns() -> dict[str, Path]:
    """The column maps in treepo/data/columns, by name."""
    return {path.stem: path for path in _SHIPPED.glob("*.yaml")}


class ColumnsConfig(Section):
    """Column names; `a.b` is b inside column a. The defaults are those of m-a-p/TreePO_data.

    The name of a file in treepo/data/columns ("gsm8k") stands for its content.
    """

    prompt: str = "prompt"
    """A string, or a list of chat messages, also as JSON text."""
    answer: str = "reward_model.ground_truth"
    """The gold answer: a string, a number, a list of which the last counts, or an object with one of them."""
    answer_after: str | None = Field(default=None, min_length=1)
    """If set, the answer is what follows the last occurrence of this text (gsm8k: "#### ")."""
    answer_boxed: bool = False
    r"""Whether the answer is the content of the last \boxed{...} in its column (minerva_math's solutions)."""
    source: str | None = "data_source"
    """The name of the set that a row belongs to; null: the file's name without its suffix."""
    extra: str | None = None
    """A column with anything that your own reward function needs; null: the function gets {}."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        named = shipped_columns()
        if value not in named:
            raise ValueError(unknown_name(value, named))
        return yaml.safe_load(named[value].read_text(encoding="utf-8"))

    @model_validator(mode="after")
    def _one_way_to_the_answer(self) -> Self:
        if self.answer_after is not None and self.answer_boxed:
            raise ValueError(
                f"answer_after = {self.answer_after!r} and answer_boxed = true are two ways to take the "
                f"answer from column {self.answer!r}; set one of them"
            )
        return self


class PromptsConfig(Section):
    """What makes a row of any file usable."""

    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Largest number of tokens in a prompt, chat template included."""
    system_prompt: str | None = None
    """If set, the system message of every prompt, in place of the row's own."""
    bad_rows: Literal["error", "skip"] = "error"
    """Whether a row that cannot be used (no prompt, no answer, too long) ends the run or is skipped."""


class RolloutDataConfig(PromptsConfig):
    prompts: PathField
    """Prompts to sample from: a .jsonl or .parquet file, a folder of them, or one saved by `datasets`."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names of `prompts`."""


class TrainFileConfig(Section):
    """A file of a mixture. Its path alone stands for one of weight 1."""

    path: PathField
    """Prompts: a .jsonl or .parquet file, a folder of them, or one saved by `datasets`."""
    weight: float = Field(default=1.0, gt=0)
    """Its part of the prompts, relative to the other files' weights: 3 and 1 are 75% and 25%."""
    name: str = Field(default="", pattern=r"^[\w.-]*$")
    """Its name in metrics and prompt ids; by default the file's name without its extension."""
    columns: ColumnsConfig | None = None
    """Column names of `path`; null: those of `data.columns`."""

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _name_fits_into_metrics(self) -> Self:
        if not re.fullmatch(r"[\w-][\w.-]*", self.label):
            raise ValueError(
                f"{self.path} would be named {self.label!r}; give it a `name` of letters, digits, _, - and "
                "., that does not begin with ."
            )
        return self

    @property
    def label(self) -> str:
        return self.name or self.path.stem


def _form(value: Any) -> str:
    return "[list]" if isinstance(value, list) else "[path]"


def _as_path(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError(
            f"should be a path, or a list of files, each a path or a section with path and weight, "
            f"found {shown(value)}"
        )
    return value


class DataConfig(PromptsConfig):
    train: Annotated[
        Annotated[PathField, BeforeValidator(_as_path), Tag("[path]")]
        | Annotated[list[TrainFileConfig], Field(min_length=1), Tag("[list]")],
        Discriminator(_form),
    ]
    """Prompts to sample from: a .jsonl or .parquet file, a folder of them, or one saved by `datasets`; or a
    list of these with weights, a mixture."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names of `train`."""
    heldout: PathField | None = None
    """Prompts for evaluation before and after training, in the columns of `heldout_columns`."""
    heldout_columns: ColumnsConfig = ColumnsConfig()
    """Column names of `heldout`; by default those of `columns`."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts (trees) sampled in one step; with `decoded_tokens_per_step`, in the first."""
    decoded_tokens_per_step: int | None = Field(default=None, ge=1)
    """A budget of decoded tokens for each step, those of dropped trees included. From the second step on, the
    number of trees is chosen to meet it, judging by the steps before: at least `learning.mini_batches` x
    `trainer.parallel.data`, at most the training set. What a step saves or overspends, up to half a budget,
    is carried to the next. Needs `loop.mode: sync` and `sampling.oversample: 1`."""

    @field_validator("train")
    @classmethod
    def _a_mixture_has_names_and_shares(cls, train: Path | list[TrainFileConfig]) -> object:
        if isinstance(train, Path):
            return train
        labels = [file.label for file in train]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"{labels.count(label)} files are named {label!r}; give each a `name` of its own"
                )
        total = sum(whole_weights(train))
        if total > _LONGEST_CYCLE:
            weights = ", ".join(str(file.weight) for file in train)
            raise ValueError(
                f"the weights {weights} are as whole numbers {total} together; at most {_LONGEST_CYCLE} are "
                "allowed: round them"
            )
        return train

    @property
    def mixture(self) -> Sequence[TrainFileConfig]:
        """The files of `train`, if it is a list; else none."""
        return () if isinstance(self.train, Path) else self.train

    @model_validator(mode="before")
    @classmethod
    def _one_set_of_columns(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "columns" not in value or "heldout_columns" in value:
            return value
        try:
            columns = ColumnsConfig.model_validate(value["columns"])
        except ValidationError:
            return value  # a mistake in `columns` is reported once
        return value | {"heldout_columns": columns}


def whole_weights(files: Sequence[TrainFileConfig]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights as written: 3 and 2 for 0.75 and 0.5."""
    weights = [Fraction(repr(file.weight)) for file in files]
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    return [weight // math.gcd(*whole) for weight in whole]
