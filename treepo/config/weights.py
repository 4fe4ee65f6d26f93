"""How the trainer's weights reach the engines."""

from typing import Literal, Self

from pydantic import Field, model_validator

from treepo.config.base import PathField, Section

_FULL_EVERY = 50


class WeightsConfig(Section):
    transport: Literal["colocated", "broadcast", "host_broadcast", "disk"] = "colocated"
    """`colocated`: through memory that trainer and engines share on one machine: the GPU's by CUDA IPC where
    every engine rank can open it and reads it fast, else the host's. `broadcast`: one collective to all
    engines, which have devices of their own (NCCL; gloo on a CPU). `host_broadcast`: the same through the
    hosts' memory (gloo), for engines on the trainer's devices on several machines. `disk`: through a folder
    that all machines share."""
    send: Literal["merged", "adapter"] = "merged"
    """What engines get of a run with `trainer.lora`. `merged`: whole weights, the adapters added to them.
    `adapter`: the adapters alone; engines serve `model.path` with them beside its weights (SGLang's LoRA)."""
    bucket_mb: int = Field(default=256, ge=1)
    """MiB of weights that an engine rank receives at a time: a bucket from each sending trainer rank. A
    larger parameter is a bucket of its own. Each sending rank holds two of its buckets, with `colocated` and
    `broadcast` on GPUs in the GPU's memory."""
    folder: PathField | None = None
    """Where `disk` writes versions; null means `weights/` in the run folder."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest versions `disk` keeps, with the bases that their deltas need."""
    delta: bool = False
    """`disk` writes what changed since the last whole version, compressed, in place of all weights;
    `host_broadcast` sends what changed since the version before. Engines put both together and verify the
    checksum of the result. At small learning rates in bfloat16 few weights change in a step. A bucket whose
    delta would be larger is sent whole. With `host_broadcast`, sources and engine ranks keep what they sent
    or received last in host memory."""
    full_every: int = Field(default=_FULL_EVERY, ge=1)
    """With `delta`, the most versions of `disk` from one that is written whole to the next. Deltas grow with
    the distance, and a version is whole sooner where that takes fewer bytes."""

    @model_validator(mode="after")
    def _check_delta(self) -> Self:
        if self.delta and self.transport not in ("disk", "host_broadcast"):
            raise ValueError(
                f"delta = true does nothing with transport = {self.transport}; disk and host_broadcast are "
                "allowed"
            )
        if self.full_every != _FULL_EVERY and not (self.delta and self.transport == "disk"):
            raise ValueError(
                f"full_every = {self.full_every} does nothing without delta = true and transport = disk"
            )
        return self
