"""Prompts: where they come from and which columns they are in."""

from typing import Literal

from pydantic import Field

from treepo.config.base import PathField, Section


class ColumnsConfig(Section):
    """Column names; `a.b` reaches into a nested column. The defaults are m-a-p/TreePO_data's."""

    prompt: str = "prompt"
    """A string, or a list of chat messages."""
    answer: str = "reward_model.ground_truth"
    """The gold answer: a string, a number, or a list of which the last counts."""
    answer_after: str | None = None
    """Where set, the answer is what follows the last occurrence of this text (gsm8k: "#### ")."""
    source: str | None = "data_source"
    """The name of the set a row belongs to; null where there is no such column."""


class DataConfig(Section):
    train: PathField
    """Training prompts: .jsonl or .parquet."""
    heldout: PathField | None = None
    """Prompts for evaluation before and after training, in TreePO_data's columns or those of `columns`."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names of `train`."""
    heldout_columns: ColumnsConfig = ColumnsConfig()
    """Column names of `heldout`."""
    prompts_per_step: int = Field(64, ge=1)
    """Prompts (trees) sampled in one step."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Most tokens in one prompt, chat template included."""
    system_prompt: str | None = None
    """Prepended as a system message where set."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used (no prompt, no answer, too long) ends the run, or is counted and skipped."""
