"""The learning rule: advantage estimator, loss, mini-batches, dynamic sampling, packing."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from treepo.config.base import Registered, Section
from treepo.learning.estimators import ESTIMATORS
from treepo.learning.kl import KL_ESTIMATORS
from treepo.learning.policy_losses import POLICY_LOSSES


class ImportanceConfig(Section):
    """Corrects for tokens sampled by older weights, or by the same weights with other rounding. Each token's
    policy loss is multiplied by a weight without gradient. The weight comes from a ratio: the trainer's
    probability before the step's first update, over the engine's.
    """

    mode: Literal["truncate", "mask", "none"] = "truncate"
    """What becomes of a ratio below `low` or above `high`: `truncate` moves it to that bound; `mask` makes it
    0, so that nothing is learned from its tokens. `none`: the weight is always 1."""
    level: Literal["token", "segment", "leaf"] = "token"
    """Which tokens have one ratio: each its own, or all of a segment, or of a leaf's response, the geometric
    mean of theirs. `leaf` needs `packing: flat`."""
    low: float | None = Field(default=None, gt=0, lt=1)
    """Smallest ratio; null: 1 / high with `mask`, 0 with `truncate`."""
    high: float = Field(default=2.0, ge=1)
    """Largest ratio."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest ratio."""
        default = 1 / self.high if self.mode == "mask" else 0.0
        return default if self.low is None else self.low, self.high

    @model_validator(mode="after")
    def _mode_reads_bounds(self) -> Self:
        for option in ("low", "high"):
            value, default = getattr(self, option), type(self).model_fields[option].default
            if self.mode == "none" and value != default:
                raise ValueError(
                    f"{option} = {value} with mode = none: only truncate and mask read it; "
                    f"leave it at {'null' if default is None else default}"
                )
        if self.mode == "mask" and self.bounds[0] == self.bounds[1]:
            raise ValueError("high = 1 with mode = mask and low = null: almost every ratio would be masked")
        return self


class LearningConfig(Section):
    estimator: Annotated[str, Registered(ESTIMATORS)] = "treepo"
    """The advantage estimator (treepo.learning.estimators)."""
    weighting: Literal["mean", "size"] = "mean"
    """How `treepo` averages over a leaf's groups: all alike, or weighted by their leaves."""
    include_root: bool = True
    """Whether the whole tree is one of `treepo`'s groups."""
    drop_zero_std: bool = False
    """Whether `treepo` skips groups whose rewards are all equal."""
    depth_count: Literal["per_leaf", "constant"] = "per_leaf"
    """What `treepo` divides by: the leaf's own number of groups, or the largest number in its tree."""
    distinct_groups: bool = False
    """Whether `treepo` counts a group once if several segments in a row have the same leaves."""
    eta: float | None = Field(default=None, gt=0, le=1)
    """`treepo_segment` multiplies a parent's value by eta^k, k the segments between it and the leaf; null: no
    discount."""
    leaf_weights: Literal["none", "inverse_branching"] = "none"
    """A leaf's weight in baselines and loss: 1, or the product of 1 / children along its path."""
    cut_baselines: bool = False
    """Whether leaves that a fallback cut added are compared with the leaves of the same cut alone, and teach
    nothing above the cut. Leaf weights are then those within a cut, too."""
    advantage_clip: float | None = Field(default=None, gt=0)
    """Advantages are clipped to [-advantage_clip, advantage_clip] after whitening; null: not at all."""
    loss: Annotated[str, Registered(POLICY_LOSSES)] = "ppo"
    """The policy loss (treepo.learning.policy_losses). `gspo` has one ratio a response and needs
    `packing: flat`; `segment_po` has one a segment."""
    clip_low: float | None = Field(default=None, ge=0, le=1)
    """The ratio is clipped from below at 1 - clip_low; null: 0.2 for `ppo`, 0.0003 for `gspo`, 0.02 for
    `segment_po`, 1 (no bound) for `cispo`."""
    clip_high: float | None = Field(default=None, ge=0)
    """The ratio is clipped from above at 1 + clip_high; null: 0.28 for `ppo` (clip-higher), 0.0004 for
    `gspo`, 0.03 for `segment_po`, 4 for `cispo`."""
    dual_clip: float | None = Field(default=None, gt=1)
    """With `ppo`, `gspo` and `segment_po`, the loss of a negative advantage is at most its size times this;
    null: 10."""
    gate_pos: float | None = Field(default=None, gt=0)
    """How fast the weight of a token with a positive advantage falls with its ratio's distance from 1 in
    `sapo` (the paper's tau); null: 1."""
    gate_neg: float | None = Field(default=None, gt=0)
    """As gate_pos, for a negative advantage; null: 1.05."""
    normalisation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """The loss is the mean over the mini-batch's tokens, the mean over trajectories of each one's own mean,
    or the sum over tokens divided by trajectories x normalisation_tokens (Dr. GRPO)."""
    normalisation_tokens: int | None = Field(default=None, ge=1)
    """Tokens that a trajectory counts as under `normalisation: constant`; usually max_response_tokens."""
    importance: ImportanceConfig = ImportanceConfig()
    """How the loss corrects for the difference between trainer and engines, staleness included."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference model; 0 loads no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it counts: as a term of the `loss`, or subtracted from the `reward` before advantages are
    estimated, summed over a leaf's response."""
    kl_estimator: Annotated[str, Registered(KL_ESTIMATORS)] = "k3"
    """How that divergence is estimated from one sampled token (treepo.learning.kl)."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    entropy_decay_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps over which that weight falls linearly to 0; null: it stays."""
    mini_batches: int = Field(default=1, ge=1)
    """Optimizer steps in one training step; whole trees are divided among them."""
    dynamic_sampling: bool = False
    """Whether a prompt whose leaves all have the same reward is replaced by another."""
    max_refills: int = Field(default=2, ge=0)
    """Most replacements in one step, as multiples of its trees (`data.prompts_per_step`); a batch that is
    still short is trained as it is."""
    packing: Literal["tree", "flat"] = "tree"
    """`tree` trains a shared token once; `flat` trains one trajectory at a time. The two agree."""

    @model_validator(mode="after")
    def _estimator_reads_options(self) -> Self:
        for option in sorted({option for entry in ESTIMATORS.values() for option in entry.options}):
            value, default = getattr(self, option), type(self).model_fields[option].default
            if value != default and option not in ESTIMATORS[self.estimator].options:
                readers = ", ".join(name for name, entry in ESTIMATORS.items() if option in entry.options)
                raise ValueError(
                    f"{option} = {value} with estimator = {self.estimator}: only {readers} reads it; "
                    f"leave it at {default}"
                )
        return self

    @property
    def loss_options(self) -> dict[str, float]:
        """The options that `loss` reads, with its own values in place of null."""
        defaults = POLICY_LOSSES[self.loss].options
        given = {option: getattr(self, option) for option in defaults}
        return {option: defaults[option] if value is None else value for option, value in given.items()}

    def entropy_coefficient_at(self, step: int) -> float:
        """The weight of the entropy bonus after `step` optimizer steps."""
        if self.entropy_decay_steps is None:
            return self.entropy_coefficient
        return self.entropy_coefficient * max(0.0, 1 - step / self.entropy_decay_steps)

    @model_validator(mode="after")
    def _kl_has_a_weight(self) -> Self:
        if self.kl_in == "reward" and not self.kl_coefficient:
            raise ValueError("kl_in = reward with kl_coefficient = 0: there is nothing to subtract")
        return self

    @model_validator(mode="after")
    def _a_bonus_decays(self) -> Self:
        if self.entropy_decay_steps is not None and not self.entropy_coefficient:
            raise ValueError(
                f"entropy_decay_steps = {self.entropy_decay_steps} with entropy_coefficient = 0: there is no "
                "bonus to decay; leave it at null"
            )
        return self

    @model_validator(mode="after")
    def _loss_reads_options(self) -> Self:
        for option in sorted({option for entry in POLICY_LOSSES.values() for option in entry.options}):
            value = getattr(self, option)
            if value is not None and option not in POLICY_LOSSES[self.loss].options:
                readers = ", ".join(name for name, entry in POLICY_LOSSES.items() if option in entry.options)
                raise ValueError(
                    f"{option} = {value} with loss = {self.loss}: only {readers} reads it; leave it at null"
                )
        return self

    @model_validator(mode="after")
    def _a_shared_token_has_one_ratio(self) -> Self:
        if POLICY_LOSSES[self.loss].level == "leaf" and self.packing == "tree":
            raise ValueError(
                f"loss = {self.loss} with packing = tree: a shared token would need a ratio for each of its "
                "leaves, and a pack keeps only the sums of their advantages; loss = segment_po or packing = "
                "flat are allowed"
            )
        return self

    @model_validator(mode="after")
    def _a_shared_token_has_one_weight(self) -> Self:
        if self.importance.level == "leaf" and self.packing == "tree":
            raise ValueError(
                "importance.level = leaf with packing = tree: a shared token would need a weight for each of "
                "its leaves, and a pack keeps only their sum; importance.level = segment or packing = flat "
                "are allowed"
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
