"""How trees are sampled: the parameters of DESIGN section 2 and of the paper's section 3."""

from typing import Literal

from pydantic import Field

from treepo.config.base import Section


class SamplingConfig(Section):
    mode: Literal["tree", "sequential"] = "tree"
    """`tree`, or `sequential`: `width` independent samples through the same path, the baseline."""
    segment_tokens: int = Field(512, ge=1)
    """Most tokens in one segment; paths are looked at, and branch, only at segment boundaries."""
    max_depth: int = Field(14, ge=1)
    """Most segments on one path."""
    width: int = Field(16, ge=1)
    """Leaves (trajectories) per prompt."""
    branching: int = Field(2, ge=1)
    """Children that the budget grants an active path at each step."""
    initial_branching: int = Field(2, ge=1)
    """Children of the prompt at the first step."""
    max_response_tokens: int = Field(7168, ge=1)
    """Most tokens in one response."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature of sampling; the actor scores with the same one."""
