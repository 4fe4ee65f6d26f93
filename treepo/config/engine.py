"""The SGLang engines."""

from typing import Literal

from pydantic import Field

from treepo.config.base import Section


class EngineConfig(Section):
    count: int = Field(default=1, ge=1)
    """Engines; each holds the whole model on one device."""
    max_total_tokens: int | None = Field(default=None, ge=1)
    """Tokens in the KV cache; by default what fits into a GPU's free memory, and 131072 on a CPU."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the device's memory for weights and KV cache together; SGLang's choice by default."""
    attention_backend: str | None = None
    """SGLang's attention kernels on a GPU, for example `triton` or `fa3`; its choice by default. A CPU has
    one kind."""
    start_seconds: float = Field(default=600, gt=0)
    """Deadline for one engine's start."""
    request_seconds: float = Field(default=3600, gt=0)
    """Deadline for one request, time in the engine's queue included."""
    update_seconds: float = Field(default=120, gt=0)
    """Deadline for each step of a weight update: running requests to end, one bucket, the commit."""
    log_level: Literal["error", "warning", "info", "debug"] = "error"
    """What SGLang's own processes write to standard error."""
