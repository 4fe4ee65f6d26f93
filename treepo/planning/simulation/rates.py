"""Seconds of an engine's forward passes, as straight lines in what they read and compute.

A decoding step of n requests takes the largest of a few lines in the KV tokens that it reads. Steps in which
only the contexts grow have a sum in closed form.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a step: `fixed` + `per_token` for each KV token that it reads."""

    fixed: float
    per_token: float

    def at(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True, slots=True)
class Prefill:
    """One batch of contexts.

    new: tokens to compute. context: all tokens, cached ones included. pairs: a new token and one that it
    attends to, itself included.
    """

    requests: int
    new: int
    context: int
    pairs: int


class Rates(Protocol):
    """latency: seconds from an answer to the arrival of the driver's next request."""

    @property
    def latency(self) -> float: ...

    def decode(self, requests: int) -> Sequence[Line]:
        """A step of `requests` requests takes the largest of these lines."""
        ...

    def prefill(self, batch: Prefill) -> float: ...


def steps_seconds(lines: Sequence[Line], tokens: int, requests: int, steps: int) -> float:
    """`steps` steps: the first reads `tokens` KV tokens, every later one `requests` more than the last."""
    edges = [0, *sorted(_crossings(lines, tokens, requests, steps)), steps]
    total = 0.0
    for start, stop in pairwise(edges):
        # The line that is largest in the middle is largest everywhere between two crossings.
        middle = tokens + requests * (start + stop - 1) / 2
        total += (stop - start) * max(line.at(middle) for line in lines)
    return total


def whole_steps(lines: Sequence[Line], tokens: int, requests: int, most: int, seconds: float) -> int:
    """The fewest steps, from 1 to `most`, that take at least `seconds`."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if steps_seconds(lines, tokens, requests, middle) >= seconds:
            high = middle
        else:
            low = middle + 1
    return low


def _crossings(lines: Sequence[Line], tokens: int, requests: int, steps: int) -> set[int]:
    """First steps at which another line may be the largest."""
    edges: set[int] = set()
    for first, second in combinations(lines, 2):
        if first.per_token != second.per_token:
            crossing = (first.fixed - second.fixed) / (second.per_token - first.per_token)
            step = (crossing - tokens) / requests
            if 0 < step < steps:
                edges.add(math.ceil(step))
    return edges - {0, steps}
