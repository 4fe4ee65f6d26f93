"""The check before the first step: whether the actor and the engines agree on the engines' log-probs."""

from pydantic import Field

from treepo.config.base import Section

MEAN_LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}
"""Float32 in two implementations differs by about 1e-6 on a CPU, and by up to 1e-4 where a GPU multiplies in
TF32; bfloat16 by about 1e-2, more with experts, whose choice it can change."""
MAX_LIMITS = {"float32": 2e-2, "bfloat16": 2.0}
"""One unlikely token is off by far more than the mean."""


class ScoreCheckConfig(Section):
    enabled: bool = True
    """Whether a run whose actor and engines disagree is stopped before its first step."""
    prompts: int = Field(default=4, ge=1)
    """Training prompts that every engine answers for it, with two short responses each."""
    mean_limit: float | None = Field(default=None, gt=0)
    """Largest mean of |actor's log-prob - engine's| over the tokens that one engine sampled; by default
    1e-3 for `model.dtype: float32` and 0.05 for bfloat16."""
    max_limit: float | None = Field(default=None, gt=0)
    """Largest |actor's log-prob - engine's| of any one token; by default 0.02 for float32 and 2 for
    bfloat16."""

    def limits(self, dtype: str) -> tuple[float, float]:
        """Of the mean and of the largest difference, for a model of this dtype."""
        mean = MEAN_LIMITS[dtype] if self.mean_limit is None else self.mean_limit
        largest = MAX_LIMITS[dtype] if self.max_limit is None else self.max_limit
        return mean, largest
