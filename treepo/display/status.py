"""The terminal output of `treepo status`."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from treepo.display.heldout import accuracies
from treepo.display.live import duration
from treepo.run_status import EvaluationStatus, PaceStatus, RunStatus

_SHOWN_METRICS = {
    "reward": "reward",
    "accuracy": "accuracy",
    "response_tokens": "tokens of an answer",
    "total_over_unique": "sharing ratio",
    "logprob_difference_mean": "log-prob difference",
    "train/entropy": "entropy",
    "tokens_per_second": "tokens/s",
    "rollout/tokens_per_second": "tokens/s",
}


def show_status(console: Console, folder: Path, status: RunStatus, conclusion: Sequence[str] = ()) -> None:
    """Show the state of a run, its step and phase, and everything that waits. conclusion: of a finished run;
    it has the first health warning.
    """
    table = Table(title=f"{folder}/", title_justify="left", show_header=False, pad_edge=False)
    for name, value in _rows(status):
        table.add_row(name, value)
    console.print(table, highlight=False, soft_wrap=True)
    for warning in status.warnings[bool(conclusion) :]:
        console.print(f"warning after step {warning.step}: {warning.text}", markup=False, soft_wrap=True)
    show_conclusion(console, conclusion)


def show_conclusion(console: Console, conclusion: Iterable[str]) -> None:
    """Show whether a finished run learned, and what to look at."""
    for line in conclusion:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rows(status: RunStatus) -> Iterator[tuple[str, Text | str]]:
    yield "state", _state(status)
    if status.reason:
        yield "reason", status.reason
    yield "process", f"{status.pid} on {status.host}"
    yield "last sign of life", _ago(status.age())
    if status.steps is not None:
        yield "steps done", f"{status.step} of {status.steps}"
    if status.pace is not None:
        yield "a step", _step(status.pace)
    if status.state == "running":
        yield from _now(status)
    for name, value in _last_numbers(status):
        yield f"last {name}", f"{value:.3g}"
    if status.evaluation is not None:
        yield from _evaluation(status.evaluation)


def _now(status: RunStatus) -> Iterator[tuple[str, str]]:
    """What a run that has not ended does."""
    if status.pace is not None:
        yield "time left", f"about {duration(status.pace.left_seconds)}"
    yield "phase", f"{status.phase}, begun {_ago(time.time() - status.phase_since)}"
    for wait in status.waits:
        yield "waits", f"{wait.who}, {duration(wait.seconds)}, for {wait.whom}"
    yield from status.engines.items()


def _state(status: RunStatus) -> Text:
    if fault := status.fault():
        return Text.assemble(("dead or stuck", "bold red"), f": {fault}")
    return Text(status.state, "bold")


def _last_numbers(status: RunStatus) -> Iterator[tuple[str, float]]:
    for metric, name in _SHOWN_METRICS.items():
        if (value := status.metrics.get(metric)) is not None:
            yield name, value


def _evaluation(found: EvaluationStatus) -> Iterator[tuple[str, str]]:
    when = f"after step {found.step}" if found.step else "before training"
    for text in accuracies(found.metrics):
        yield f"held-out accuracy {when}", text
    if (best := found.metrics.get("heldout/best_step")) is not None:
        yield "best step so far", f"{best:.0f}"


def _step(pace: PaceStatus) -> str:
    """The seconds of a step, and whether they become more."""
    trend = ""
    if pace.change is not None:
        word = "slower" if pace.change > 0 else "faster"
        trend = f", {abs(pace.change):.0%} {word} than the ten before"
    return f"{pace.step_seconds:.1f} s{trend}"


def _ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"
