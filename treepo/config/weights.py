"""How the trainer's weights reach the engines."""

from typing import Literal

from pydantic import Field

from treepo.config.base import PathField, Section


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
    """How many of the newest versions `disk` keeps."""
