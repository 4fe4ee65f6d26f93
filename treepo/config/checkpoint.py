"""Training checkpoints: what `--resume` goes on from."""

from pydantic import Field

from treepo.config.base import Section


class CheckpointConfig(Section):
    every: int | None = Field(default=10, ge=1)
    """Steps between training checkpoints; the last step has one too. Null: none, and nothing to resume."""
    keep: int | None = Field(default=2, ge=1)
    """Only the newest so many stay; null: all. One takes 14 bytes a parameter in bfloat16, 12 in float32."""
