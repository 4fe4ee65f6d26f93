"""The SGLang engines."""

from pydantic import Field

from treepo.config.base import Section


class EngineConfig(Section):
    count: int = Field(1, ge=1)
    """Engines; each holds the whole model (times `tensor_parallel` devices)."""
    max_total_tokens: int | None = Field(None, ge=1)
    """Tokens in the KV cache; by default SGLang derives it from the free memory."""
    start_seconds: float = Field(600, gt=0)
    """Deadline for one engine's start."""
