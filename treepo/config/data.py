"""Prompts: their files, and the columns that hold them."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from treepo.config.base import PathField, Section, unknown_name

_SHIPPED = Path(__file__).parents[1] / "data/columns"


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


class DataConfig(PromptsConfig):
    train: PathField
    """Prompts to sample from: a .jsonl or .parquet file, a folder of them, or one saved by `datasets`."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names of `train`."""
    heldout: PathField | None = None
    """Prompts for evaluation before and after training, in the columns of `heldout_columns`."""
    heldout_columns: ColumnsConfig = ColumnsConfig()
    """Column names of `heldout`; by default those of `columns`."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts (trees) sampled in one step."""

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
