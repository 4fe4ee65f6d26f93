"""Says in three lines whether a finished run learned, and what to look at.

The first line compares the accuracy on held-out sets before and after training; a difference counts if it is
more than two standard errors. The second is about the training reward, whose steps have different prompts.
The third says what to look at. Where the numbers do not tell, the lines say so.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from treepo.config.heldout import HELDOUT
from treepo.run_status import read_status
from treepo.training.metrics import evaluated_sets, heldout_metric
from treepo.training.run_folder import BEST, CHECKPOINT, METRICS, read_metrics
from treepo.watchdog import STATUS

type Record = Mapping[str, float | None]

_ERRORS = 2.0  # standard errors beyond which a difference is taken as one
_SMALL = 0.05  # of accuracy: a run that cannot have gained as much has not learned
_MOST_STEPS, _FEWEST_STEPS = 10, 2  # at each end, whose rewards are compared


class Warned(Protocol):
    """A health warning."""

    @property
    def step(self) -> int: ...
    @property
    def text(self) -> str: ...


def conclusion_of(folder: Path) -> tuple[str, ...]:
    """The three lines about the finished run in a folder; none if it trained nothing, as a rollout.

    Raises DataError if its files are not those of a run.
    """
    if not (folder / METRICS).is_file():
        return ()
    warnings = read_status(folder).warnings if (folder / STATUS).is_file() else ()
    return conclusion(list(read_metrics(folder / METRICS)), warnings, folder)


def conclusion(records: Sequence[Record], warnings: Sequence[Warned], folder: Path) -> tuple[str, str, str]:
    """The three lines. records: the lines of metrics.jsonl. warnings: in their order. folder: of the run."""
    evaluations = [record for record in records if evaluated_sets(record)]
    changes = _changes(evaluations)
    steps = [record for record in records if "seconds/step" in record]
    return (
        _heldout_line(changes),
        _reward_line(steps),
        f"Look at: {'; '.join(_places(evaluations, changes, warnings, folder))}",
    )


@dataclass(frozen=True, slots=True)
class _Change:
    """A number at the beginning and at the end. error: of the difference, a standard error; nan: unknown."""

    name: str
    before: float
    after: float
    error: float

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def direction(self) -> int:
        """1 if it rose, -1 if it fell, 0 if neither is clear."""
        if not abs(self.difference) > _ERRORS * self.error:
            return 0
        return 1 if self.difference > 0 else -1

    @property
    def gains_nothing(self) -> bool:
        """Whether a gain that is worth the name is excluded."""
        return self.difference + _ERRORS * self.error < _SMALL


def _changes(evaluations: Sequence[Record]) -> list[_Change]:
    """Of the accuracy on each set, from the first evaluation to the last one."""
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    changes = []
    for name in evaluated_sets(last):
        metric, error = heldout_metric(name, "accuracy"), heldout_metric(name, "standard_error")
        before, after = _number(first, metric), _number(last, metric)
        if math.isfinite(before) and math.isfinite(after):
            both = math.hypot(_number(first, error), _number(last, error))
            changes.append(_Change(name, before, after, both))
    return changes


def _heldout_line(changes: Sequence[_Change]) -> str:
    if not changes:
        return (
            "Whether it learned cannot be told: there is no held-out accuracy of before and after training "
            "(data.heldout names a file for it)."
        )
    directions = {change.direction for change in changes}
    numbers = "; ".join(
        _from_to(change, named=[one.name for one in changes] != [HELDOUT]) for change in changes
    )
    if {1, -1} <= directions:
        verdict = "It learned one thing and lost another"
    elif 1 in directions:
        verdict = "It learned"
    elif -1 in directions:
        verdict = "It got worse"
    elif all(change.gains_nothing for change in changes):
        verdict = "It did not learn"
    else:
        return (
            f"Whether it learned cannot be told: held-out accuracy went {numbers}, which is within two "
            "standard errors; more held-out problems or evaluation.samples would tell."
        )
    return f"{verdict}: held-out accuracy went {numbers}."


def _from_to(change: _Change, *, named: bool) -> str:
    text = f"from {change.before:.3f} to {change.after:.3f}"
    if math.isfinite(change.error):
        text += f" ({change.difference:+.3f} ± {change.error:.3f})"
    return f"{text} on {change.name}" if named else text


def _reward_line(steps: Sequence[Record]) -> str:
    rewards = [value for step in steps if math.isfinite(value := _number(step, "reward"))]
    number = min(_MOST_STEPS, len(rewards) // 3)
    if number < _FEWEST_STEPS:
        return f"The training reward of {len(rewards)} steps is too little to tell a trend."
    first, last = rewards[:number], rewards[-number:]
    error = math.hypot(statistics.stdev(first), statistics.stdev(last)) / math.sqrt(number)
    change = _Change("reward", statistics.mean(first), statistics.mean(last), error)
    verb = {1: "rose", 0: "did not change clearly", -1: "fell"}[change.direction]
    return (
        f"The training reward {verb}: {change.before:.3f} in the first {number} steps, {change.after:.3f} in "
        f"the last {number}."
    )


def _places(
    evaluations: Sequence[Record], changes: Sequence[_Change], warnings: Sequence[Warned], folder: Path
) -> Iterable[str]:
    """What to look at, the most urgent first."""
    if warnings:
        others = f" (and {len(warnings) - 1} more in `treepo status {folder}`)" if len(warnings) > 1 else ""
        yield f"the warning after step {warnings[0].step}, {warnings[0].text}{others}"
    best = _number(evaluations[-1], "heldout/best_step") if evaluations else math.nan
    if math.isfinite(best) and best != evaluations[-1]["step"] and (folder / BEST).is_dir():
        yield f"{folder / BEST}/, the model with the highest held-out accuracy, after step {best:.0f}"
    yield f"treepo view {folder} (curves, and the answers themselves)"
    if not any(change.direction for change in changes) and (folder / CHECKPOINT).is_dir():
        yield f"treepo eval --model {folder / CHECKPOINT} --data FILE (a report on a larger set)"


def _number(record: Record, name: str) -> float:
    """The number, or nan."""
    value = record.get(name)
    return math.nan if value is None else value
