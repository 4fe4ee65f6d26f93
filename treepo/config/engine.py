"""The SGLang engines."""

from typing import Literal

from pydantic import Field

from treepo.config.base import Section


class EngineConfig(Section):
    count: int = Field(default=1, ge=1)
    """Engines; each holds the whole model."""
    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel ranks of one engine, each on a device of its own; an engine's are on one node."""
    max_total_tokens: int | None = Field(default=None, ge=1)
    """Tokens in the KV cache; by default what fits into a GPU's free memory, and 131072 on a CPU."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share, for weights and KV cache together, of the memory that an engine finds free on its device when it
    starts; SGLang's choice by default."""
    attention_backend: str | None = None
    """SGLang's attention kernels on a GPU, for example `triton` or `fa3`; its choice by default. A CPU has
    one kind."""
    start_seconds: float = Field(default=600, gt=0)
    """Deadline for one engine's start."""
    request_seconds: float = Field(default=3600, gt=0)
    """Deadline for one request, time in the engine's queue included."""
    update_seconds: float = Field(default=120, gt=0)
    """Deadline for each step of a weight update: running requests to end, one bucket, the commit."""
    health_seconds: float = Field(default=60, gt=0)
    """An engine whose requests have all waited for so long is asked for one token, and restarted where
    it then answers nothing at all within as long again."""
    stall_seconds: float = Field(default=300, gt=0)
    """Where no engine has answered any request for so long, the log says who waits for what."""
    max_restarts: int = Field(default=8, ge=0)
    """Restarts of lost engines in one run; an engine that is lost after that is not replaced."""
    log_level: Literal["error", "warning", "info", "debug"] = "error"
    """What SGLang's own processes write to standard error."""
