"""Training checkpoints, from which `--resume` continues."""

from pydantic import Field

from treepo.config.base import Section


class CheckpointConfig(Section):
    every: int | None = Field(default=10, ge=1)
    """Steps between training checkpoints; the last step has one too. Null: no checkpoints, and no resume."""
    keep: int | None = Field(default=2, ge=1)
    """Newest checkpoints to keep, besides the one of `evaluation.best`; null: all. One takes 14 bytes a
    parameter in bfloat16, 12 in float32."""
