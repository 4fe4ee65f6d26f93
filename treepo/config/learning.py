"""The learning rule: advantage estimator, loss, mini-batches, dynamic sampling, overlong shaping."""

from typing import Literal, Self

from pydantic import Field, model_validator

from treepo.config.base import Section


class LearningConfig(Section):
    estimator: str = "treepo"
    """A registered advantage estimator (treepo.advantage)."""
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
    eta: float | None = Field(None, gt=0, le=1)
    """`treepo_segment`'s discount of the parent's value, to the power of the distance to the nearest leaf; null: 1."""
    leaf_weights: Literal["none", "inverse_branching"] = "none"
    """Weight of a leaf in baselines and loss: 1, or the product of 1 / children along its path."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0)
    """The ratio is clipped from above at 1 + clip_high (clip-higher)."""
    dual_clip: float = Field(10.0, gt=1)
    """A negative advantage's loss is bounded at this many times its size."""
    normalisation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """The loss is the mean over the mini-batch's tokens, the mean over trajectories of each one's own mean,
    or the sum over tokens divided by trajectories x normalisation_tokens (Dr. GRPO)."""
    normalisation_tokens: int | None = Field(None, ge=1)
    """Tokens that a trajectory counts for under `normalisation: constant`; usually max_response_tokens."""
    importance_cap: float | None = Field(2.0, gt=0)
    """Each token's loss is multiplied by min(actor probability / engine probability, this); null: by 1."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the reference model; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """The estimate of that divergence from one sampled token."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps that one step's trees are divided into, prompt by prompt."""
    packing: Literal["tree", "flat"] = "tree"
    """`tree` trains a shared token once; `flat` trains one trajectory at a time. The two agree."""

    @model_validator(mode="after")
    def _constant_has_tokens(self) -> Self:
        if (self.normalisation == "constant") != (self.normalisation_tokens is not None):
            raise ValueError(
                f"normalisation = {self.normalisation} with normalisation_tokens = {self.normalisation_tokens}: "
                "`constant` needs a number of tokens, the others take none"
            )
        return self
