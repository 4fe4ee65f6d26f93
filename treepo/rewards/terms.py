"""Terms that are added to the grader's reward: one registered function each, by weight in `reward.terms`.

A term sees the graded responses of one prompt and gives one number a response, which is multiplied by its
weight. Terms shape what is learned from a tree, not which trees are: dynamic sampling looks at the
grader's reward alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from treepo.rollout.boxed import count_boxes

if TYPE_CHECKING:  # the configuration checks itself against the registry below
    from treepo.config.reward import RewardConfig


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """The graded responses of one prompt. limit: max_response_tokens.

    text_L: special tokens left out. tokens_L: int64, the end token counted. correct_L: bool.
    """

    text_L: tuple[str, ...]  # noqa: N815 - the suffix names the dimension
    tokens_L: np.ndarray  # noqa: N815
    correct_L: np.ndarray  # noqa: N815
    limit: int


Term = Callable[[Responses, "RewardConfig"], np.ndarray]
TERMS: dict[str, Term] = {}


def register(term: Term) -> Term:
    """Make a term a key of `reward.terms`, under the function's name. It gives float64 [L]."""
    assert term.__name__ not in TERMS, term.__name__
    TERMS[term.__name__] = term
    return term


@register
def overlong(responses: Responses, config: RewardConfig) -> np.ndarray:
    """Soft overlong punishment (DAPO, equation 13): 0 up to limit - overlong_buffer_tokens tokens, from
    there linear down to -1 at the limit.
    """
    assert config.overlong_buffer_tokens is not None
    over_L = responses.tokens_L - (responses.limit - config.overlong_buffer_tokens)
    return -np.clip(over_L / config.overlong_buffer_tokens, 0.0, 1.0)


@register
def length(responses: Responses, config: RewardConfig) -> np.ndarray:  # noqa: ARG001 - the signature of a term
    """A response's length among those of its prompt (Kimi k1.5, section 2.3.3): 0.5 for the shortest,
    linear down to -0.5 for the longest, and never above 0 where the answer is not correct.

    0 for all where all are equally long.
    """
    shortest, longest = responses.tokens_L.min(), responses.tokens_L.max()
    if shortest == longest:
        return np.zeros(len(responses.tokens_L))
    value_L = 0.5 - (responses.tokens_L - shortest) / (longest - shortest)
    return np.where(responses.correct_L, value_L, np.minimum(value_L, 0.0))


@register
def format_boxed(responses: Responses, config: RewardConfig) -> np.ndarray:  # noqa: ARG001 - as above
    """1 for a response with an answer in a box, 0 for one without."""
    return np.array([float(count_boxes(text) > 0) for text in responses.text_L])


@register
def format_one_box(responses: Responses, config: RewardConfig) -> np.ndarray:  # noqa: ARG001 - as above
    """1 for a response with exactly one box, 0 for any other."""
    return np.array([float(count_boxes(text) == 1) for text in responses.text_L])
