"""The state of a run besides weights and optimizer state, and the clock that counts its seconds."""

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from treepo.errors import one_line, shortened
from treepo.protocols import BatchResult
from treepo.rollout.stats import Stats
from treepo.training.health import Health
from treepo.training.metrics import evaluated_sets
from treepo.training.pace import PaceMeter
from treepo.training.scheduler import ScheduleState
from treepo.watchdog import Watchdog

_log = logging.getLogger(__name__)
CONTINUES = "continues after step"
"""How the log's entry of a run that resumes begins."""


@dataclass(slots=True)
class RunState:
    """Everything that a run carries from step to step; a checkpoint saves it whole.

    data: fingerprint of the training prompts. schedule: which of them are not trained yet. resampled: trees
    that a resumed run found too stale. trainer_restarts: after a rank died or hung. accuracy_before: on the
    first held-out set, before training. sizes: bytes of the growing files, by name, when the state was saved.
    seconds: total time of the run, before and after interruptions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    data: str
    steps_done: int = 0
    schedule: ScheduleState = field(default_factory=ScheduleState)
    resampled: int = 0
    trainer_restarts: int = 0
    accuracy_before: float | None = None
    decoded_tokens: int = 0
    sequential_tokens: int = 0
    max_logprob_difference: float = 0.0
    seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_manifest(cls, values: Mapping[str, Any]) -> Self:
        """The state in a checkpoint's manifest. Raises ValueError if it is not one."""
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(values))  # strict types need JSON
        except ValidationError as error:
            fault = error.errors()[0]
            key = shortened(".".join(map(str, fault["loc"])))
            raise ValueError(f"{key}: {one_line(fault['msg'])}") from None
        if min([state.steps_done, *state.sizes.values()]) < 0:
            raise ValueError("steps_done and sizes cannot be negative")
        state.schedule.check(state.steps_done)
        return state

    def step_done(self, step: int, stats: Stats, result: BatchResult) -> None:
        """Count a step whose weights the engines serve."""
        self.steps_done = step
        self.decoded_tokens += stats.decoded_tokens
        self.sequential_tokens += stats.total_tokens
        if math.isfinite(result.mismatch.largest):  # JSON has no other number
            self.max_logprob_difference = max(self.max_logprob_difference, result.mismatch.largest)

    def summary(
        self,
        dtype: str,
        accuracy_after: float | None,
        best: Mapping[str, float] | None,
        log_prob_check: Mapping[str, float] | None,
    ) -> dict[str, Any]:
        """The content of summary.json.

        dtype: of the model's parameters. accuracy_after: on the first held-out set. best: step and accuracy
        of the model in `best/`; None without one. log_prob_check: the figures of the check; None if it is
        off.
        """
        return {
            "dtype": dtype,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": accuracy_after,
            "best": best,
            "seconds": self.seconds,
            "steps": self.steps_done,
            "decoded_tokens": self.decoded_tokens,
            "sequential_tokens": self.sequential_tokens,
            "resampled_trees": self.resampled,
            "trainer_restarts": self.trainer_restarts,
            "log_prob_check": log_prob_check,
            "max_logprob_difference": self.max_logprob_difference,
            "phase_seconds": self.phase_seconds,
        }


class Reporter(Protocol):
    """Shows a run to a person."""

    def phase(self, name: str, announce: bool = False) -> None:
        """Show that the run enters a phase; `announce` marks a long phase that comes once."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show what an evaluation after a step has found, by the names in metrics.jsonl; step 0: before
        training.
        """


class Watched:
    """A `Reporter` that tells the watchdog of the run what it shows, with pace and health warnings."""

    def __init__(self, reporter: Reporter, watchdog: Watchdog, steps: int, health: Health) -> None:
        self._reporter, self._watchdog, self._health = reporter, watchdog, health
        self._pace = PaceMeter(steps)

    def phase(self, name: str, announce: bool = False) -> None:
        self._watchdog.phase(name)
        self._reporter.phase(name, announce)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._reporter.step(step, metrics)
        for warning in self._health.step(step, metrics):
            _log.warning("step %d: %s", step, warning.text)
        self._watchdog.step(step, metrics, self._pace.step(step, metrics), self._health.warnings)

    def known(self, earlier: Iterable[Mapping[str, float | None]]) -> None:
        """Have the status begin with the last evaluation of before. earlier: the lines of metrics.jsonl."""
        for record in earlier:
            if evaluated_sets(record):
                found = {name: value for name, value in record.items() if value is not None}
                self._watchdog.evaluated(int(found["step"]), found)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._watchdog.evaluated(step, metrics)
        self._reporter.evaluated(step, metrics)


class Clock:
    """Adds the seconds of each phase to the state, and tells the reporter which phase runs."""

    def __init__(self, state: RunState, reporter: Reporter) -> None:
        self._state, self._reporter = state, reporter
        self._started = time.perf_counter() - state.seconds
        self._step_seconds: dict[str, float] = {}
        self._step_began = time.perf_counter()

    def show(self, phase: str, announce: bool = False) -> None:
        """Show the phase that begins, without counting its time."""
        self._reporter.phase(phase, announce)

    @contextmanager
    def phase(self, name: str, announce: bool = False) -> Iterator[None]:
        """Count the body's time as that of the phase."""
        self.show(name, announce)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.count(name, time.perf_counter() - start)

    def count(self, phase: str, seconds: float) -> None:
        """Add to the phase's time."""
        for counts in (self._state.phase_seconds, self._step_seconds):
            counts[phase] = counts.get(phase, 0.0) + seconds
        self._state.seconds = time.perf_counter() - self._started

    def take_step_seconds(self) -> tuple[dict[str, float], float]:
        """Return the seconds of each phase since the last call, and the seconds since then in all."""
        taken, self._step_seconds = self._step_seconds, {}
        began, self._step_began = self._step_began, time.perf_counter()
        return taken, self._step_began - began
