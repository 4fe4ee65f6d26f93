"""How trees are sampled: the parameters of the paper's section 3 and the policies of its official code.

docs/sampling.md explains every policy; docs/from_treepo.md maps the official recipe's options to these keys.
The names of budgets, allocations, places, leaf orders and cut rules come from `treepo.rollout.policies`.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticKnownError

from treepo.config.base import Section
from treepo.rollout.policies import ALLOCATIONS, BUDGETS, CUTS, ORDERS, PLACES


def bounds(value: int | str) -> tuple[int, int]:
    """Lowest and highest value of a number or of a range such as "2-8", both included."""
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
"""A number from 1, or a range "low-high" from which a number is drawn."""


def _one_of(names: Iterable[str]) -> tuple[BeforeValidator, WithJsonSchema]:
    """Annotations of a key that takes a registered name; its errors and its schema are those of a Literal."""
    allowed = list(names)
    quoted = [f"'{name}'" for name in allowed]
    expected = f"{', '.join(quoted[:-1])} or {quoted[-1]}"

    def check(value: Any) -> Any:
        if value not in allowed:
            raise PydanticKnownError("literal_error", {"expected": expected})
        return value

    return BeforeValidator(check), WithJsonSchema({"type": "string", "enum": allowed})


BudgetName = Annotated[str, *_one_of(BUDGETS)]
AllocationName = Annotated[str, *_one_of(ALLOCATIONS)]
PlaceName = Annotated[str, *_one_of(PLACES)]
OrderName = Annotated[str, *_one_of(ORDERS)]
CutName = Annotated[str, *_one_of([*CUTS, "none"])]


class AllocationConfig(Section):
    """How a tree step's children are divided among the active paths."""

    policy: AllocationName = Field(
        default="average",
        description=f"{ALLOCATIONS.describe()} "
        "All but `average` give each path one child and divide the rest by a softmax over the paths.",
    )
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of that softmax; with a schedule, its value at the first step."""
    schedule: Literal["constant", "sinusoidal"] = "constant"
    """`sinusoidal` moves the temperature over training from `temperature` to `final_temperature`, along half
    a sine wave."""
    final_temperature: float | None = Field(default=None, gt=0)
    """The softmax's temperature from step `schedule_steps` on."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """Training steps that the schedule takes."""

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> Self:
        given = {"final_temperature": self.final_temperature, "schedule_steps": self.schedule_steps}
        if self.schedule == "sinusoidal" and None in given.values():
            missing = " and ".join(name for name, value in given.items() if value is None)
            raise ValueError(f"schedule = sinusoidal needs {missing}")
        if self.schedule == "constant" and any(value is not None for value in given.values()):
            extra = ", ".join(f"{name} = {value}" for name, value in given.items() if value is not None)
            raise ValueError(f"{extra} does nothing with schedule = constant; sinusoidal is allowed")
        return self


class BranchConfig(Section):
    """Where the active paths of a tree branch."""

    from_depth: int = Field(default=1, ge=1)
    """Segments that a path must have before it branches."""
    at: PlaceName = Field(
        default="end",
        description="Where the further children of a path begin, in its last segment; one child always goes "
        f"on at the end. {PLACES.describe()}",
    )
    window_tokens: int = Field(default=1, ge=1)
    """Tokens of `surprise` whose mean log-prob is compared."""
    lookahead: int | None = Field(default=None, ge=1)
    """Siblings first sample this many tokens. Of those that begin with the same tokens, one goes on and the
    others are given up. Less than segment_tokens; null: all go on."""

    @model_validator(mode="after")
    def _window_is_used(self) -> Self:
        if self.window_tokens != 1 and self.at != "surprise":
            raise ValueError(
                f"window_tokens = {self.window_tokens} does nothing with at = {self.at}; surprise is allowed"
            )
        return self


class RepetitionConfig(Section):
    """A response loops when its last tokens have occurred in it many times, anywhere and without overlap."""

    check: Literal["first", "last", "off"] = "last"
    """Look for loops before every other stop, after every other stop, or never."""
    window_tokens: int = Field(default=32, ge=1)
    """Length of the run of last tokens that is looked for."""
    count: int = Field(default=8, ge=2)
    """Occurrences, the last one included, that make a loop."""
    min_distinct: int = Field(default=5, ge=1)
    """If the run has fewer distinct tokens than this (a table rule, a row of zeros), only occurrences less
    than a window apart count."""


class StopsConfig(Section):
    """When a path ends. The end of sequence, the response limit and the depth limit always end it."""

    boxed: Literal["end", "with_eos", "off"] = "end"
    """`end`: a complete box ends the path at the next segment boundary. `with_eos`: a box does not end the
    path, but a leaf that has one at the end of sequence counts as boxed. `off`: boxes are not looked for."""
    repetition: RepetitionConfig = RepetitionConfig()
    """When a response counts as a loop."""


class FallbackConfig(Section):
    """How a tree that has no active path and wants more leaves goes on: it cuts finished responses."""

    cut: CutName = Field(
        default="random",
        description="Where the chosen leaf's response is cut. "
        + CUTS.describe().removesuffix(".")
        + "; `none`: nowhere, and a tree may end with fewer leaves than `width`.",
    )
    order: OrderName = Field(
        default="boxed_or_eos",
        description=f"Which leaves are continued first; the prompt, if none is admitted. {ORDERS.describe()}",
    )
    window_tokens: int | None = Field(default=None, ge=1)
    """Grid of the random cuts; segment_tokens by default. If it is set, a shorter response restarts at the
    prompt, whatever the cut."""
    max_windows: int | None = Field(default=None, ge=1)
    """Random cuts lie within this many windows of the response's end."""
    min_windows: int | None = Field(default=None, ge=1)
    """Least length, in windows, of a response that `boxed_long` admits."""
    block_tokens: int = Field(default=128, ge=1)
    """Size of the blocks of the cuts `block` and `inverse_block`."""
    aligned: bool = True
    """Whether a cut moves back to the segment boundary before it; otherwise it may split a segment."""

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

    @model_validator(mode="after")
    def _pivots_are_aligned(self) -> Self:
        if self.cut == "pivot" and not self.aligned:
            raise ValueError(
                "aligned = false does nothing with cut = pivot, which cuts at segment boundaries"
            )
        return self

    def read_rewards(self) -> dict[str, str]:
        """The keys whose policies read rewards, with these."""
        registries = {"order": ORDERS, "cut": CUTS}
        chosen = {key: getattr(self, key) for key in registries}
        return {key: name for key, name in chosen.items() if name in registries[key].reads_rewards}


class SamplingConfig(Section):
    mode: Literal["tree", "sequential"] = "tree"
    """`tree`, or `sequential`: `width` independent samples of each prompt by the same code, as a baseline."""
    segment_tokens: int = Field(default=512, ge=1)
    """Most tokens in one segment; paths stop only at segment boundaries, and branch only there
    unless `branch.at` says otherwise."""
    max_depth: int = Field(default=14, ge=1)
    """Most segments on one path; `sequential` mode ignores it."""
    width: NumberOrRange = 16
    """Leaves (trajectories) per prompt. From a range, a tree stops at the lower number if the rewards of its
    leaves are all equal, and otherwise goes on to the higher one; training only."""
    branching: NumberOrRange = 2
    """Children of an active path at each step, by the budget; also the continuations of one fallback cut."""
    initial_branching: NumberOrRange = 2
    """Children of the prompt at the first step; from a range, each prompt draws its own."""
    max_response_tokens: int = Field(default=7168, ge=1)
    """Most tokens in one response."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of sampling; the trainer computes its log-probs at the same one."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens, as few as have this probability together. Evaluations and rollouts
    only, as `top_k`, `min_p` and `from_model`: training samples from all tokens."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from this many of the likeliest tokens; null: from all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Sample from the tokens with at least this fraction of the likeliest token's probability."""
    from_model: bool = False
    """Take the values of `temperature`, `top_p`, `top_k` and `min_p` that are not given from the model's
    generation_config.json, which its authors recommend."""
    budget: BudgetName = Field(
        default="fixed",
        description="Children of all active paths together at one tree step, never fewer than one for each. "
        f"{BUDGETS.describe()} A finished path leaves its share to the others.",
    )
    tokens_per_step: int | None = Field(default=None, ge=1)
    """Under `budget: tokens`, most tokens that one tree samples in one step."""
    cap: Literal["trajectories", "response_tokens"] = "trajectories"
    """What bounds a tree: `width` leaves, or also `tree_response_tokens`."""
    tree_response_tokens: int | None = Field(default=None, ge=1)
    """Under `cap: response_tokens`, tokens of all of a tree's responses together; a shared token counts once
    for each. The number of leaves is estimated from the lengths so far when the tree branches or falls
    back."""
    min_width: int = Field(default=1, ge=1)
    """Leaves that a tree gets even after `tree_response_tokens` are used up."""
    allocation: AllocationConfig = AllocationConfig()
    """How the budget is divided among the paths."""
    branch: BranchConfig = BranchConfig()
    """Where paths branch."""
    stops: StopsConfig = StopsConfig()
    """When a path ends."""
    fallback: FallbackConfig = FallbackConfig()
    """How a tree that ran out of active paths goes on."""
    oversample: float = Field(default=1.0, ge=1)
    """Start this many times the trees that a step needs, and train the first that finish; the others pause
    while the trainer learns and go on under the next weights. Training only, with `loop.mode: sync`."""
    max_live_trees: int | None = Field(default=None, ge=1)
    """Most trees on one engine at once; by default as many as its KV cache can hold."""
    attempts: int = Field(default=4, ge=1)
    """Attempts at one request before its tree is given up."""
    retry_seconds: float = Field(default=1.0, ge=0)
    """Wait before the second attempt; it doubles before each further one."""

    @property
    def least_leaves(self) -> int:
        """Leaves at which a tree may stop because they agree."""
        return bounds(self.width)[0]

    @property
    def most_leaves(self) -> int:
        """The most leaves of one tree."""
        return bounds(self.width)[1]

    @property
    def reads_rewards(self) -> list[str]:
        """The settings, as `key = value`, by which a tree decides from the rewards of its leaves."""
        chosen = [f"width = {self.width}"] if self.least_leaves < self.most_leaves else []
        if self.mode == "sequential" or self.fallback.cut == "none":
            return chosen
        return chosen + [f"fallback.{key} = {value}" for key, value in self.fallback.read_rewards().items()]

    def without_rewards(self) -> Self:
        """A copy for estimates: policies that read rewards are replaced by the defaults."""
        defaults = {key: getattr(FallbackConfig(), key) for key in self.fallback.read_rewards()}
        fallback = self.fallback.model_copy(update=defaults)
        return self.model_copy(update={"fallback": fallback, "width": self.most_leaves})

    @property
    def longest_response(self) -> int:
        """Most tokens that one response can have."""
        if self.mode == "sequential":
            return self.max_response_tokens
        return min(self.max_depth * self.segment_tokens, self.max_response_tokens)

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
        if total is not None and self.least_leaves < self.most_leaves:
            raise ValueError(
                f"width = {self.width} with cap = {self.cap}: a token cap and the rewards would both bound "
                "the leaves; a number, or cap = trajectories, is allowed"
            )
        if self.min_width > self.most_leaves:
            raise ValueError(f"min_width = {self.min_width} is more than width = {self.width}")
        if total is None and self.min_width > 1:
            raise ValueError(
                f"min_width = {self.min_width} does nothing with cap = {self.cap}; response_tokens is allowed"
            )
        return self

    @model_validator(mode="after")
    def _initial_branching_fits(self) -> Self:
        highest = bounds(self.initial_branching)[1]
        if self.mode == "tree" and highest > self.least_leaves:
            raise ValueError(
                f"initial_branching = {self.initial_branching} is more than width = {self.width}"
                + (f" allows, {self.least_leaves}" if self.least_leaves < self.most_leaves else "")
            )
        return self

    @model_validator(mode="after")
    def _can_go_on(self) -> Self:
        ranged = self.least_leaves < self.most_leaves
        if ranged and self.mode == "tree" and self.fallback.cut == "none":
            raise ValueError(
                f"width = {self.width} with fallback.cut = none: a tree goes on by falling back; a number, "
                "or another cut, is allowed"
            )
        return self

    @model_validator(mode="after")
    def _branches_below_max_depth(self) -> Self:
        if self.mode == "tree" and 1 < self.branch.from_depth >= self.max_depth:
            raise ValueError(
                f"branch.from_depth = {self.branch.from_depth} with max_depth = {self.max_depth}: no path "
                f"would branch; less than {self.max_depth} is allowed"
            )
        return self

    @model_validator(mode="after")
    def _looks_ahead_within_a_segment(self) -> Self:
        ahead = self.branch.lookahead
        if self.mode == "tree" and ahead is not None and ahead >= self.segment_tokens:
            raise ValueError(
                f"branch.lookahead = {ahead} is not less than segment_tokens = {self.segment_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _window_is_aligned(self) -> Self:
        window = self.fallback.window_tokens
        if window is not None and self.fallback.aligned and window % self.segment_tokens:
            raise ValueError(
                f"fallback.window_tokens = {window} is not a multiple of "
                f"segment_tokens = {self.segment_tokens}; allowed with fallback.aligned = false"
            )
        return self


def untrained[S: SamplingConfig](sampling: S) -> S:
    """Validate the sampling of a command that trains nothing."""
    if sampling.reads_rewards:
        raise ValueError(
            f"{', '.join(sampling.reads_rewards)}: only treepo train grades answers while their tree grows; "
            "choose policies that read no rewards"
        )
    if sampling.oversample != 1:
        raise ValueError(
            f"oversample = {sampling.oversample:g}: every prompt is sampled once, and only training starts "
            "more trees than it needs; 1 is allowed"
        )
    return sampling
