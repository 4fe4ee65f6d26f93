"""The SGLang engines: how many, how large, and their deadlines."""

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from treepo.config.base import Section


class EngineConfig(Section):
    count: int = Field(default=1, ge=1)
    """Number of engines; each holds the whole model."""
    tensor: int = Field(default=1, ge=1)
    """Ranks among which each layer is divided, each on its own device. May be more than a node has."""
    pipeline: int = Field(default=1, ge=1)
    """Stages of one engine, each of `tensor` ranks with an equal part of the layers."""
    expert: int = Field(default=1, ge=1)
    """Parts into which a mixture's experts are dealt out, in each layer; `tensor` / `expert` ranks share a
    part. Must divide `tensor`."""
    nodes: int | None = Field(default=None, ge=1)
    """Nodes over which the ranks of one engine are divided evenly. By default as few as have enough GPUs, and
    one without GPUs."""
    max_total_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one engine's KV cache; by default what fits into a GPU's free memory, and 131072 on a CPU."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the memory that is free on the device when an engine starts, for weights and KV cache
    together; SGLang's choice by default."""
    attention_backend: str | None = None
    """SGLang's attention kernels on a GPU, for example `triton` or `fa3`; its choice by default. On a
    CPU there is only one."""
    start_seconds: float = Field(default=600, gt=0)
    """Deadline for the start of one engine."""
    request_seconds: float = Field(default=3600, gt=0)
    """Deadline for one request, time in the engine's queue included."""
    update_seconds: float = Field(default=120, gt=0)
    """Deadline for each step of a weight sync: running requests to end, one bucket, the commit."""
    health_seconds: float = Field(default=60, gt=0)
    """An engine that has answered none of its requests for this long is asked for one token, and restarted if
    it answers nothing within as long again."""
    stall_seconds: float = Field(default=300, gt=0)
    """After this long without any answer, the log names each engine's state and its unanswered requests."""
    max_restarts: int = Field(default=8, ge=0)
    """Restarts of lost engines in one run; an engine that is lost after them is not replaced."""
    rejoin_seconds: float = Field(default=1800, gt=0)
    """How long an engine whose node has left the cluster waits for free devices on any node, while the others
    go on. It is given up after that; waiting costs no restart."""
    log_level: Literal["error", "warning", "info", "debug"] = "error"
    """What SGLang's own processes write to standard error."""
    sglang: dict[str, JsonValue] = Field(default={})
    """Further arguments of SGLang by their names in its `ServerArgs`, for example
    `{kv_cache_dtype: fp8_e5m2}`. Names, types and choices are checked before anything starts; an argument
    that another key sets is refused."""

    @property
    def ranks(self) -> int:
        """Ranks of one engine."""
        return self.tensor * self.pipeline

    @model_validator(mode="after")
    def _ranks_divide(self) -> Self:
        if self.tensor % self.expert:
            raise ValueError(
                f"engine.expert = {self.expert} does not divide engine.tensor = {self.tensor}; "
                f"{_listed(n for n in range(1, self.tensor + 1) if self.tensor % n == 0)} are allowed"
            )
        allowed = node_counts(self.tensor, self.pipeline)
        if self.nodes is not None and self.nodes not in allowed:
            raise ValueError(
                f"engine.nodes = {self.nodes}: engine.tensor x engine.pipeline = {self.tensor} x "
                f"{self.pipeline} ranks can be divided over {_listed(allowed)} nodes: whole stages, or equal "
                "parts of a stage"
            )
        return self


def node_counts(tensor: int, pipeline: int) -> list[int]:
    """Numbers of nodes over which an engine can be divided, the smallest first: a node has an equal number of
    whole stages, or an equal part of one.
    """
    stages = [count for count in range(1, pipeline) if pipeline % count == 0]
    return stages + [pipeline * count for count in range(1, tensor + 1) if tensor % count == 0]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
