"""The check before the first step: whether the trainer and the engines agree on the engines' log-probs."""

from pydantic import Field

from treepo.config.base import Section

# On a CPU the quickstart's toy has a mean of 2e-7 in float32 and 1e-3 in bfloat16, at most 2e-6 and 5e-2.
# The limits leave room for larger models, experts whose choice rounding can change, and TF32 on GPUs.
MEAN_LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}
MAX_LIMITS = {"float32": 2e-2, "bfloat16": 2.0}  # one unlikely token is off by far more than the mean


class LogProbCheckConfig(Section):
    enabled: bool = True
    """Whether a run whose trainer and engines disagree is stopped before its first step."""
    prompts: int = Field(default=4, ge=1)
    """Training prompts that every engine answers for it, with two short responses each."""
    mean_limit: float | None = Field(default=None, gt=0)
    """Largest mean of |trainer's log-prob - engine's| over the tokens that one engine sampled; by default
    1e-3 for `model.dtype: float32` and 0.05 for bfloat16."""
    max_limit: float | None = Field(default=None, gt=0)
    """Largest |trainer's log-prob - engine's| of any one token; by default 0.02 for float32 and 2 for
    bfloat16."""

    def limits(self, dtype: str) -> tuple[float, float]:
        """Of the mean and of the largest difference, for a model of this dtype."""
        mean = MEAN_LIMITS[dtype] if self.mean_limit is None else self.mean_limit
        largest = MAX_LIMITS[dtype] if self.max_limit is None else self.max_limit
        return mean, largest
