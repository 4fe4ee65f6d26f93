"""Measures how far the engines' log-probs are from the trainer's, on the tokens that are trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from treepo.learning.packing import Pack


@dataclass(frozen=True, slots=True)
class LogProbMismatch:
    """Sums over |trainer's log-prob - engine's|, in nats. Sums of several replicas and mini-batches add up.

    total, weight: a token counts once for every trajectory that shares it. Tokens sampled by older weights
    count too, so the sums show staleness as well as rounding.
    """

    total: float = 0.0
    weight: float = 0.0
    largest: float = 0.0

    @classmethod
    def of(cls, packs: Iterable[Pack]) -> Self:
        """Measure packs that carry `old_log_prob`."""
        total = weight = largest = 0.0
        for pack in packs:
            assert pack.old_log_prob is not None, "the trainer's log-probs are missing"
            count = pack.count_pos + pack.count_neg
            difference = np.abs(pack.old_log_prob - pack.rollout_log_prob, dtype=np.float64) * (count > 0)
            total += float(difference @ count)
            weight += float(count.sum())
            largest = _larger(largest, float(difference.max()))
        return cls(total, weight, largest)

    def __add__(self, other: "LogProbMismatch") -> "LogProbMismatch":
        return LogProbMismatch(
            self.total + other.total, self.weight + other.weight, _larger(self.largest, other.largest)
        )

    @property
    def mean(self) -> float:
        """Mean over the trained tokens of all trajectories; 0 if nothing is trained."""
        return self.total / max(self.weight, 1.0)


def _larger(one: float, other: float) -> float:
    return float(np.maximum(one, other))  # `max` would lose a NaN
