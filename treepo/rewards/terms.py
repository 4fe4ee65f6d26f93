"""Terms that are added to the grader's reward: one registered function each, by weight in `reward.terms`.

A term sees the graded responses of one prompt and returns one number for each, which is multiplied by the
term's weight. Terms change what is learned from a tree, not which trees are trained: dynamic sampling looks
at the grader's reward alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from treepo.rollout.boxed import count_boxes


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """The graded leaves of one tree, and the settings that terms read.

    text_L: without special tokens. tokens_L: int64, the end token counted. correct_L: bool.
    max_tokens: `sampling.max_response_tokens`. overlong_buffer_tokens: as in `reward`; set for `overlong`.
    """

    text_L: tuple[str, ...]  # noqa: N815 - the suffix names the dimension
    tokens_L: np.ndarray  # noqa: N815
    correct_L: np.ndarray  # noqa: N815
    max_tokens: int
    overlong_buffer_tokens: int | None = None


Term = Callable[[Responses], np.ndarray]
TERMS: dict[str, Term] = {}


def register(term: Term) -> Term:
    """Make a term a key of `reward.terms`, under the function's name. It returns float64 [L]."""
    assert term.__name__ not in TERMS, term.__name__
    TERMS[term.__name__] = term
    return term


@register
def overlong(responses: Responses) -> np.ndarray:
    """Soft overlong punishment (DAPO, equation 13): 0 up to max_tokens - overlong_buffer_tokens tokens, then
    linear down to -1 at max_tokens.
    """
    buffer = responses.overlong_buffer_tokens
    assert buffer is not None
    over_L = responses.tokens_L - (responses.max_tokens - buffer)
    return -np.clip(over_L / buffer, 0.0, 1.0)


@register
def length(responses: Responses) -> np.ndarray:
    """Length among the prompt's responses (Kimi k1.5, section 2.3.3): 0.5 for the shortest, linear down to
    -0.5 for the longest, at most 0 for an answer that is not correct; 0 for all if all are equally long.
    """
    shortest, longest = responses.tokens_L.min(), responses.tokens_L.max()
    if shortest == longest:
        return np.zeros(len(responses.tokens_L))
    value_L = 0.5 - (responses.tokens_L - shortest) / (longest - shortest)
    return np.where(responses.correct_L, value_L, np.minimum(value_L, 0.0))


@register
def format_boxed(responses: Responses) -> np.ndarray:
    """1 for a response with an answer in a box, 0 for one without."""
    return np.array([float(count_boxes(text) > 0) for text in responses.text_L])


@register
def format_one_box(responses: Responses) -> np.ndarray:
    """1 for a response with exactly one box, 0 for any other."""
    return np.array([float(count_boxes(text) == 1) for text in responses.text_L])
