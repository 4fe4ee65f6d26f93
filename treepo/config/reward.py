"""Grading: who grades, what a verdict is worth, what is added to it, and when too much has failed."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from treepo.config.base import Section
from treepo.rewards.terms import TERMS

# Keys that not every way of grading reads, and which do.
_READERS = {
    "batch_size": ("url",),
    "attempts": ("url",),
    "memory_mb": ("function", "math-verify"),
    "correct": ("math-verify",),
    "wrong": ("math-verify",),
}


class RewardConfig(Section):
    function: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Your own reward, `module:function`, called in the grading processes as f(prompt, response, answer,
    extra) -> float or dict (see treepo.rewards.custom); null grades mathematics with math-verify."""
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+\S*$")
    """Your own endpoint, which gets responses in batches (see treepo.rewards.endpoint); null: none."""
    workers: int = Field(default=4, ge=1)
    """Grading processes; with `url`, requests at a time."""
    deadline_seconds: float = Field(default=5.0, gt=0)
    """A response not graded by then is killed with its worker; verdict `timeout`. With `url`: the time that
    one request may take."""
    batch_size: int = Field(default=32, ge=1)
    """Most responses in one request to `url`."""
    attempts: int = Field(default=3, ge=1)
    """How often a batch is sent to `url` that gets no reply in time, or status 408, 425, 429 or 5xx. The wait
    in between starts at half a second and doubles."""
    memory_mb: int = Field(default=2048, ge=256)
    """Address space (MiB) that one worker may use beyond what it starts with; verdict `error` above it."""
    correct: float = 1.0
    """Reward of a correct answer."""
    wrong: float = -1.0
    """Reward of a wrong answer or of none."""
    max_failed_share: float = Field(default=0.2, ge=0, le=1)
    """The run stops where more of a step's (or an evaluation's) responses than this share, and at least 8,
    end in `timeout` or `error`."""
    terms: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default={})
    """What is added to the rewards before training, by name, times this weight (treepo.rewards.terms)."""
    overlong_buffer_tokens: int | None = Field(default=None, ge=1)
    """The term `overlong` falls over the last so many tokens below max_response_tokens."""

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
    def _terms_are_known(self) -> Self:
        for name in self.terms:
            if name not in TERMS:
                raise ValueError(f"terms.{name}: no such term; there are: {', '.join(sorted(TERMS))}")
        if ("overlong" in self.terms) != (self.overlong_buffer_tokens is not None):
            raise ValueError(
                f"overlong_buffer_tokens = {self.overlong_buffer_tokens} with terms = {self.terms}: the term "
                "`overlong` needs a number of tokens, and nothing else reads it"
            )
        return self
