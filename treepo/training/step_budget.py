"""The number of trees of a step, if a step has a budget of decoded tokens. Pure.

A step's trees are counted before any of them begins, so none is favoured because it is short:

    trees = (budget + what earlier steps left) / (decoded tokens for each tree)

The tokens for a tree are a mean over the earlier steps, in which each counts half as much as the step after
it. If the tokens of a tree have the relative spread v, a step of n trees misses its budget by the share
v sqrt(4 / 3n); with the last step's mean alone it would be v sqrt(2 / n). The mean is two steps old on
average, and so too low while answers become longer; but what one step misses the next one makes good, so that
under a steady drift each step decodes its budget.

A run therefore decodes the sum of its budgets, up to what its last step missed, as long as no step misses by
more than half a budget.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

_KEPT = 0.5  # weight of a step beside the one after it
_MOST_CARRIED = 0.5  # budgets


@dataclass(frozen=True, slots=True)
class Spending:
    """What the earlier steps have decoded; a checkpoint keeps it.

    left: tokens that they left for the next step; negative if they decoded too many. decoded, trees: their
    tokens and trees, each step with its weight.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    left: float = 0.0
    decoded: float = 0.0
    trees: float = 0.0

    def check(self) -> None:
        """Raise ValueError if no steps have decoded this."""
        if not all(map(math.isfinite, (self.left, self.decoded, self.trees))):
            raise ValueError("spent: left, decoded and trees must be finite")
        if min(self.decoded, self.trees) < 0:
            raise ValueError("spent: decoded and trees cannot be negative")


@dataclass(frozen=True, slots=True)
class StepBudget:
    """tokens: that a step should decode. first: trees of the first step. least, most: of a later one."""

    tokens: int
    first: int
    least: int
    most: int

    def trees(self, spent: Spending) -> int:
        """The trees of the next step."""
        if not spent.decoded:
            return self.first
        wanted = (self.tokens + spent.left) * spent.trees / spent.decoded
        return round(min(max(wanted, self.least), self.most))

    def after(self, spent: Spending, trees: int, decoded: int) -> Spending:
        """The spending after a step.

        trees: that it was to train. decoded: its tokens, those of dropped and failed trees included.
        """
        most = _MOST_CARRIED * self.tokens
        return Spending(
            left=min(max(spent.left + self.tokens - decoded, -most), most),
            decoded=_KEPT * spent.decoded + decoded,
            trees=_KEPT * spent.trees + trees,
        )
