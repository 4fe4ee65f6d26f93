"""Assumptions of `treepo plan`: devices, nodes, lengths of prompts and answers."""

from typing import Literal

from pydantic import Field

from treepo.config.base import PathField, Section


class PlanConfig(Section):
    device: Literal["cpu", "a100-40gb", "a100-80gb", "h100", "h200", "b200"] = "h100"
    """Kind of device; treepo/planning/hardware.py has its memory and rates. `cpu`: this machine."""
    devices_per_node: int = Field(default=8, ge=1)
    """Devices of one node."""
    node_memory_gib: float = Field(default=1024, gt=0)
    """Host memory of one node."""
    network_gb_per_second: float = Field(default=50, gt=0)
    """Rate from each device to other nodes, in 1e9 bytes a second; 50 is 400 Gbit/s."""
    architecture: PathField | None = None
    """A folder with the model's config.json, used if `model.path` has none."""
    response_tokens: float | None = Field(default=None, gt=0)
    """Mean length of an answer; by default half of `sampling.max_response_tokens`."""
    response_sigma: float = Field(default=0.6, ge=0)
    """Standard deviation of the logarithm of answers' lengths."""
    prompt_tokens: int | None = Field(default=None, ge=1)
    """Length of a prompt; by default half of `data.max_prompt_tokens`."""
