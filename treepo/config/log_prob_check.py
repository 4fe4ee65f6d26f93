"""The log-prob check before the first step: trainer and engines must agree on sampled tokens."""

from pydantic import Field

from treepo.config.base import Section

# The quickstart's toy on a CPU differs by 2e-7 on average and 2e-6 at most in float32, by 1e-3 and 5e-2 in
# bfloat16. The limits leave room for larger models, for rounding that changes the choice of experts, and for
# TF32 on GPUs.
MEAN_LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}
MAX_LIMITS = {"float32": 2e-2, "bfloat16": 2.0}  # one unlikely token is off by far more than the mean


class LogProbCheckConfig(Section):
    enabled: bool = True
    """Whether a run stops before its first step if trainer and engines disagree."""
    prompts: int = Field(default=4, ge=1)
    """Training prompts that every engine answers for the check, with two short responses each."""
    mean_limit: float | None = Field(default=None, gt=0)
    """Largest mean of |trainer's log-prob - engine's| over the tokens that one engine sampled; by default
    1e-3 for `model.dtype: float32` and 0.05 for bfloat16."""
    max_limit: float | None = Field(default=None, gt=0)
    """Largest |trainer's log-prob - engine's| of any one token; by default 0.02 for float32 and 2 for
    bfloat16."""

    def limits(self, dtype: str) -> tuple[float, float]:
        """Limits of the mean and of the largest difference, for a model of this dtype."""
        mean = MEAN_LIMITS[dtype] if self.mean_limit is None else self.mean_limit
        largest = MAX_LIMITS[dtype] if self.max_limit is None else self.max_limit
        return mean, largest
