"""The learning rule: advantage estimator and loss."""

from typing import Literal

from pydantic import Field

from treepo.config.base import Section


class LearningConfig(Section):
    estimator: Literal["treepo"] = "treepo"
    """A registered advantage estimator (treepo.advantage)."""
    clip_low: float = Field(0.2, ge=0)
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0)
    """The ratio is clipped from above at 1 + clip_high (clip-higher)."""
    dual_clip: float = Field(10.0, gt=1)
    """A negative advantage's loss is bounded at this many times its size."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps that one step's trees are divided into, prompt by prompt."""
    packing: Literal["tree", "flat"] = "tree"
    """`tree` trains a shared token once; `flat` trains one trajectory at a time. The two agree."""
