"""Grading: the grader, the reward of a verdict, the terms added to it, and how many failures stop a run."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from treepo.config.base import Registered, Section
from treepo.rewards.extraction import BOXED, RULES, check_rule
from treepo.rewards.terms import TERMS

# Keys that not every way of grading reads, and the ways that read them.
_READERS = {
    "batch_size": ("url",),
    "attempts": ("url",),
    "memory_mb": ("function", "math-verify"),
    "answer": ("math-verify",),
    "correct": ("math-verify",),
    "wrong": ("math-verify",),
}


class RewardConfig(Section):
    function: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Your own reward, `module:function`, called in the grading processes as f(prompt, response, answer,
    extra) -> float or dict (see treepo.rewards.custom); null: math-verify grades."""
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/@]+(/\S*)?$")
    """Your own endpoint, which grades responses in batches (see treepo.rewards.endpoint); null: none. The
    variable TREEPO_REWARD_AUTHORIZATION is sent to it as the header `Authorization`; a URL with a name and a
    password is refused, because the URL is in the run's files."""
    answer: Annotated[str, AfterValidator(check_rule), WithJsonSchema({"enum": list(RULES)})] = BOXED
    r"""What counts as the answer of a response. `boxed`: its last box. `boxed_or_last`: its last box, else
    what follows "the answer is", else its last number, as in the official scorer. `after:"TEXT"`: what
    follows the last TEXT, for example `after:"#### "`."""
    workers: int = Field(default=4, ge=1)
    """Grading processes; with `url`, requests at a time."""
    deadline_seconds: float = Field(default=5.0, gt=0)
    """Time to grade one response; a worker that takes longer is killed, and the verdict is `timeout`. With
    `url`: time for one request."""
    batch_size: int = Field(default=32, ge=1)
    """Most responses in one request to `url`."""
    attempts: int = Field(default=3, ge=1)
    """How often a batch is sent to `url` if no reply comes in time, or status 408, 425, 429 or 5xx. The wait
    between attempts starts at half a second and doubles."""
    memory_mb: int = Field(default=2048, ge=256)
    """Address space (MiB) that a worker may add to its start; above it the verdict is `error`."""
    correct: float = 1.0
    """Reward of a correct answer."""
    wrong: float = -1.0
    """Reward of a wrong answer, or of a response without one."""
    max_failed_share: float = Field(default=0.2, ge=0, le=1)
    """The run stops if more than this share of a step's (or an evaluation's) responses, and at least 8, end
    in `timeout` or `error`."""
    terms: dict[Annotated[str, Registered(TERMS)], Annotated[float, Field(gt=0, allow_inf_nan=False)]] = (
        Field(default={})
    )
    """Terms added to the reward before training, each with its weight (treepo.rewards.terms)."""
    overlong_buffer_tokens: int | None = Field(default=None, ge=1)
    """The term `overlong` falls over this many tokens below max_response_tokens."""

    @model_validator(mode="after")
    def _one_grader(self) -> Self:
        if self.function is not None and self.url is not None:
            raise ValueError(
                f"function = {self.function} and url = {self.url} are two ways to grade; set one of them"
            )
        grader = "url" if self.url else "function" if self.function else "math-verify"
        for key, readers in _READERS.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default and grader not in readers:
                raise ValueError(
                    f"{key} = {value}, but {grader} grades, and only {' and '.join(readers)} read it; "
                    f"leave it at {default}"
                )
        return self

    @model_validator(mode="after")
    def _overlong_has_tokens(self) -> Self:
        if ("overlong" in self.terms) != (self.overlong_buffer_tokens is not None):
            raise ValueError(
                f"overlong_buffer_tokens = {self.overlong_buffer_tokens} with terms = {self.terms}: the term "
                "`overlong` needs a number of tokens, and nothing else reads it"
            )
        return self
