"""The learning rule: advantage estimator, loss, mini-batches, dynamic sampling."""

from typing import Literal, Self

from pydantic import Field, model_validator

from treepo.config.base import Section
from treepo.learning.advantage import ESTIMATORS


class LearningConfig(Section):
    estimator: str = "treepo"
    """A registered advantage estimator (treepo.learning.advantage)."""
    weighting: Literal["mean", "size"] = "mean"
    """How `treepo` averages over a leaf's groups: each alike, or by the leaves in it."""
    include_root: bool = True
    """Whether the whole prompt is one of `treepo`'s groups."""
    drop_zero_std: bool = False
    """Whether `treepo` skips groups whose rewards are all equal."""
    depth_count: Literal["per_leaf", "constant"] = "per_leaf"
    """What `treepo` divides by: a leaf's own groups, or the most that a leaf of the prompt has."""
    distinct_groups: bool = False
    """Whether `treepo` counts a group once that several segments in a row share (no branching between)."""
    eta: float | None = Field(default=None, gt=0, le=1)
    """`treepo_segment` discounts a parent's value by this to the power of its distance, in segments, to the
    leaf; null: no discount."""
    leaf_weights: Literal["none", "inverse_branching"] = "none"
    """Weight of a leaf in baselines and loss: 1, or the product of 1 / children along its path."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = Field(default=0.28, ge=0)
    """The ratio is clipped from above at 1 + clip_high (clip-higher)."""
    dual_clip: float = Field(default=10.0, gt=1)
    """A negative advantage's loss is bounded at this many times its size."""
    normalisation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """The loss is the mean over the mini-batch's tokens, the mean over trajectories of each one's own mean,
    or the sum over tokens divided by trajectories x normalisation_tokens (Dr. GRPO)."""
    normalisation_tokens: int | None = Field(default=None, ge=1)
    """Tokens that a trajectory counts for under `normalisation: constant`; usually max_response_tokens."""
    importance_cap: float | None = Field(default=2.0, gt=0)
    """Each token's loss is multiplied by min(trainer probability / engine probability, this); null: by 1."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence to the reference model; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """The estimate of that divergence from one sampled token."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    mini_batches: int = Field(default=1, ge=1)
    """Optimizer steps that one step's trees are divided into, prompt by prompt."""
    dynamic_sampling: bool = False
    """Whether prompts whose leaves all have the same reward are replaced by further prompts."""
    max_refills: int = Field(default=2, ge=0)
    """Rounds of further prompts for one batch; it is trained short if they do not suffice."""
    packing: Literal["tree", "flat"] = "tree"
    """`tree` trains a shared token once; `flat` trains one trajectory at a time. The two agree."""

    @model_validator(mode="after")
    def _estimator_reads_options(self) -> Self:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator = {self.estimator} is not one of {', '.join(sorted(ESTIMATORS))}")
        for option in sorted({option for entry in ESTIMATORS.values() for option in entry.reads}):
            value, default = getattr(self, option), type(self).model_fields[option].default
            if value != default and option not in ESTIMATORS[self.estimator].reads:
                readers = ", ".join(name for name, entry in ESTIMATORS.items() if option in entry.reads)
                raise ValueError(
                    f"{option} = {value} with estimator = {self.estimator}: only {readers} reads it; "
                    f"leave it at {default}"
                )
        return self

    @model_validator(mode="after")
    def _constant_has_tokens(self) -> Self:
        if (self.normalisation == "constant") != (self.normalisation_tokens is not None):
            raise ValueError(
                f"normalisation = {self.normalisation} with normalisation_tokens = "
                f"{self.normalisation_tokens}: `constant` needs a number of tokens, the others take none"
            )
        return self
