"""How trees are sampled: the parameters of the paper's section 3 and every policy of its official code.

docs/sampling.md says what each policy does and which knob of the official recipe it stands for.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from treepo.config.base import Section


def bounds(value: int | str) -> tuple[int, int]:
    """Lowest and highest of a number or of a range such as "2-8", both included."""
    low, _, high = str(value).partition("-")
    return int(low), int(high or low)


def _number_or_range(value: object) -> object:
    is_number = type(value) is int and value >= 1
    if not is_number and not (
        isinstance(value, str)
        and re.fullmatch(r"[1-9]\d*-[1-9]\d*", value)
        and bounds(value)[0] < bounds(value)[1]
    ):
        raise ValueError(f'{value!r} is neither a whole number from 1 nor a rising range such as "2-8"')
    return value


NumberOrRange = Annotated[int | str, BeforeValidator(_number_or_range)]
"""A number from 1, or a range "low-high" from which one is drawn."""


class AllocationConfig(Section):
    """How a tree step's children are divided among the active paths."""

    policy: Literal["average", "low_sum", "high_sum", "low_mean", "high_mean", "low_last", "high_last"] = (
        "average"
    )
    """`average`: the same for each, the remainder to the last path. The others give every path one child and
    divide the rest by a softmax over the paths' log-probs, favouring `low` or `high` ones: summed over the
    response, its mean over the response, or over its last segment_tokens tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Of that softmax; with a schedule, its value at the first step."""
    schedule: Literal["constant", "sinusoidal"] = "constant"
    """Over training, `sinusoidal` leads the temperature from `temperature` to `final_temperature` along
    half a sine wave."""
    final_temperature: float | None = Field(default=None, gt=0)
    """The softmax's temperature at step `schedule_steps` and after it."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """Training steps that the schedule takes."""

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Self:
        given = {"final_temperature": self.final_temperature, "schedule_steps": self.schedule_steps}
        if self.schedule == "sinusoidal" and None in given.values():
            missing = " and ".join(name for name, value in given.items() if value is None)
            raise ValueError(f"schedule = sinusoidal needs {missing}")
        if self.schedule == "constant" and any(value is not None for value in given.values()):
            extra = ", ".join(f"{name} = {value}" for name, value in given.items() if value is not None)
            raise ValueError(f"{extra} does nothing with schedule = constant; sinusoidal is allowed")
        return self


class RepetitionConfig(Section):
    """A response loops when its last tokens have occurred often before, anywhere in it, without overlap."""

    check: Literal["first", "last", "off"] = "last"
    """Before every other stop, after every other stop, or never."""
    window_tokens: int = Field(default=32, ge=1)
    """How many last tokens."""
    count: int = Field(default=8, ge=2)
    """Occurrences, the last one included, that make a loop."""
    min_distinct: int = Field(default=5, ge=1)
    """Where the last tokens are fewer distinct ones (a table rule, a row of zeros), only occurrences less
    than a window apart count."""


class StopsConfig(Section):
    """When a path ends. The end of sequence, the response limit and the depth always end it."""

    boxed: Literal["end", "with_eos", "off"] = "end"
    """`end`: a complete box ends the path at the next segment boundary. `with_eos`: only the end of sequence
    does, and a leaf with a box then counts as boxed. `off`: boxes are not looked for."""
    repetition: RepetitionConfig = RepetitionConfig()
    """Paths that loop."""


class FallbackConfig(Section):
    """Where a tree goes on that has no active path and leaves to sample."""

    cut: Literal["random", "min_log_prob", "block", "inverse_block", "from_start", "none"] = "random"
    """Where the chosen leaf's response is cut: at a random window boundary, at its least likely token, at the
    start of a block drawn by softmax of its negative (`block`) or positive (`inverse_block`) mean log-prob,
    or at the prompt. `none`: a tree may end with fewer leaves than `width`."""
    order: Literal["finished_strict", "finished", "random", "boxed_or_eos", "longer", "boxed_long"] = (
        "boxed_or_eos"
    )
    """Which leaves are cut first: by how they ended, strictly or by chance; at random; boxed and ended ones
    only; longer ones by chance; boxed ones of at least `min_windows` only. Without any: the prompt."""
    window_tokens: int | None = Field(default=None, ge=1)
    """Grid of the random cuts; segment_tokens by default. A leaf shorter than this restarts at the prompt."""
    max_windows: int | None = Field(default=None, ge=1)
    """Random cuts lie within this many windows of the leaf's end."""
    min_windows: int | None = Field(default=None, ge=1)
    """Windows that a leaf must have for `boxed_long`."""
    block_tokens: int = Field(default=128, ge=1)
    """Size of the blocks of the cuts `block` and `inverse_block`."""
    aligned: bool = True
    """Cuts move back to the segment boundary before them. Otherwise a cut may split a segment."""

    @model_validator(mode="after")
    def _windows_are_used(self) -> Self:
        if (self.order == "boxed_long") != (self.min_windows is not None):
            raise ValueError(
                f"order = {self.order} with min_windows = {self.min_windows}: boxed_long, and no other "
                "order, needs a number"
            )
        if self.max_windows is not None and self.cut != "random":
            raise ValueError(
                f"max_windows = {self.max_windows} does nothing with cut = {self.cut}; random is allowed"
            )
        return self


class SamplingConfig(Section):
    mode: Literal["tree", "sequential"] = "tree"
    """`tree`, or `sequential`: `width` independent samples through the same path, the baseline."""
    segment_tokens: int = Field(default=512, ge=1)
    """Most tokens in one segment; paths are looked at, and branch, only at segment boundaries."""
    max_depth: int = Field(default=14, ge=1)
    """Most segments on one path; not looked at in `sequential` mode."""
    width: int = Field(default=16, ge=1)
    """Leaves (trajectories) per prompt."""
    branching: NumberOrRange = 2
    """Children that the budget grants an active path at each step; also continuations of a fallback's cut."""
    initial_branching: NumberOrRange = 2
    """Children of the prompt at the first step; a range is drawn from for each prompt."""
    max_response_tokens: int = Field(default=7168, ge=1)
    """Most tokens in one response."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of sampling; the trainer scores with the same one."""
    budget: Literal["fixed", "random", "tokens"] = "fixed"
    """Children of one tree step: `branching` for each path that was active before it (so a finished path's
    share passes to the others); the same with `branching` drawn from its range at each step; or
    `tokens_per_step` divided by segment_tokens. Never fewer than one for each path."""
    tokens_per_step: int | None = Field(default=None, ge=1)
    """Tokens that one tree may ask for in one step under `budget: tokens`."""
    cap: Literal["trajectories", "response_tokens"] = "trajectories"
    """What bounds a tree: `width` leaves, or also `tree_response_tokens`."""
    tree_response_tokens: int | None = Field(default=None, ge=1)
    """Under `cap: response_tokens`, tokens of all of a tree's responses together, a shared token once for
    each; an estimate from the lengths so far, checked when the tree branches or falls back."""
    min_width: int = Field(default=1, ge=1)
    """Leaves that a tree is given even when `tree_response_tokens` are used up."""
    allocation: AllocationConfig = AllocationConfig()
    """How the budget is divided among the paths."""
    stops: StopsConfig = StopsConfig()
    """When a path ends."""
    fallback: FallbackConfig = FallbackConfig()
    """Where a tree goes on that ran out of active paths."""
    max_live_trees: int | None = Field(default=None, ge=1)
    """Trees that one engine holds at once; by default as many as its KV cache can keep."""
    attempts: int = Field(default=4, ge=1)
    """Tries of one request before its tree is given up."""
    retry_seconds: float = Field(default=1.0, ge=0)
    """Wait before the second try; doubled before each further one."""

    @model_validator(mode="after")
    def _budget_fits(self) -> Self:
        drawn = isinstance(self.branching, str)
        if drawn != (self.budget == "random"):
            raise ValueError(
                f"budget = {self.budget} with branching = {self.branching}: random needs a range such as "
                '"2-4", fixed and tokens a number'
            )
        if (self.budget == "tokens") != (self.tokens_per_step is not None):
            raise ValueError(
                f"budget = {self.budget} with tokens_per_step = {self.tokens_per_step}: tokens, and no other "
                "budget, needs a number"
            )
        if self.tokens_per_step is not None and self.tokens_per_step < self.segment_tokens:
            raise ValueError(
                f"tokens_per_step = {self.tokens_per_step} is less than "
                f"segment_tokens = {self.segment_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _cap_fits(self) -> Self:
        total = self.tree_response_tokens
        if (self.cap == "response_tokens") != (total is not None):
            raise ValueError(
                f"cap = {self.cap} with tree_response_tokens = {total}: response_tokens, and no other cap, "
                "needs a number"
            )
        if total is not None and total < self.segment_tokens:
            raise ValueError(
                f"tree_response_tokens = {total} is less than segment_tokens = {self.segment_tokens}"
            )
        if self.min_width > self.width:
            raise ValueError(f"min_width = {self.min_width} is more than width = {self.width}")
        if total is None and self.min_width > 1:
            raise ValueError(
                f"min_width = {self.min_width} does nothing with cap = {self.cap}; response_tokens is allowed"
            )
        return self

    @model_validator(mode="after")
    def _initial_branching_fits(self) -> Self:
        highest = bounds(self.initial_branching)[1]
        if self.mode == "tree" and highest > self.width:
            raise ValueError(
                f"initial_branching = {self.initial_branching} is more than width = {self.width}"
            )
        return self

    @model_validator(mode="after")
    def _window_is_aligned(self) -> Self:
        window = self.fallback.window_tokens
        if window is not None and self.fallback.aligned and window % self.segment_tokens:
            raise ValueError(
                f"fallback.window_tokens = {window} is no multiple of "
                f"segment_tokens = {self.segment_tokens}; allowed with fallback.aligned = false"
            )
        return self
