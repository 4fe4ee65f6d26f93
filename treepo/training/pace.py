"""How fast a run goes: the seconds of a step, whether steps become slower, and the time that is left."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

_STEPS = 10


@dataclass(frozen=True, slots=True)
class Pace:
    """step_seconds: mean of the last 10 steps. change: against the 10 before them, as a share (0.1: 10%
    slower); None until there are such. left_seconds: until the last step is done, evaluations and checkpoints
    between steps included.
    """

    step_seconds: float
    change: float | None
    left_seconds: float


class PaceMeter:
    """Follows the steps of a run. steps: their number in all.

    The first step of a start is left out once there are others, because it compiles and warms up.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._warm_up: float | None = None
        self._seconds: deque[float] = deque(maxlen=2 * _STEPS)

    def step(self, step: int, metrics: Mapping[str, float]) -> Pace:
        """Count a finished step, and return the pace since."""
        seconds = metrics["seconds/step"]
        if self._warm_up is None:
            self._warm_up = seconds
        else:
            self._seconds.append(seconds)
        known = list(self._seconds) or [self._warm_up]
        last, before = known[-_STEPS:], known[:-_STEPS]
        mean = sum(last) / len(last)
        change = mean / (sum(before) / _STEPS) - 1 if len(before) == _STEPS else None
        return Pace(mean, change, mean * (self._steps - step))
