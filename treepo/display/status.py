"""The terminal output of `treepo status`."""

import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from treepo.display.live import duration
from treepo.run_status import PaceStatus, RunStatus

_SHOWN_METRICS = {
    "reward": "reward",
    "accuracy": "accuracy",
    "heldout/accuracy": "held-out accuracy",
    "response_tokens": "tokens of an answer",
    "total_over_unique": "sharing ratio",
    "logprob_difference_mean": "log-prob difference",
    "train/entropy": "entropy",
    "tokens_per_second": "tokens/s",
    "rollout/tokens_per_second": "tokens/s",
}


def show_status(console: Console, folder: Path, status: RunStatus) -> None:
    """Show the state of a run, its step and phase, and everything that waits."""
    table = Table(title=f"{folder}/", title_justify="left", show_header=False, pad_edge=False)
    table.add_row("state", _state(status))
    if status.reason:
        table.add_row("reason", status.reason)
    table.add_row("process", f"{status.pid} on {status.host}")
    table.add_row("last sign of life", _ago(status.age()))
    if status.steps is not None:
        table.add_row("steps done", f"{status.step} of {status.steps}")
    if status.pace is not None:
        table.add_row("a step", _step(status.pace))
        if status.state == "running":
            table.add_row("time left", f"about {duration(status.pace.left_seconds)}")
    if status.state == "running":
        table.add_row("phase", f"{status.phase}, begun {_ago(time.time() - status.phase_since)}")
        for wait in status.waits:
            table.add_row("waits", f"{wait.who}, {duration(wait.seconds)}, for {wait.whom}")
        for name, state in status.engines.items():
            table.add_row(name, state)
    for name, value in _last_numbers(status):
        table.add_row(f"last {name}", f"{value:.3g}")
    console.print(table, highlight=False, soft_wrap=True)
    for warning in status.warnings:
        console.print(f"warning after step {warning.step}: {warning.text}", markup=False, soft_wrap=True)


def _state(status: RunStatus) -> Text:
    if fault := status.fault():
        return Text.assemble(("dead or stuck", "bold red"), f": {fault}")
    return Text(status.state, "bold")


def _last_numbers(status: RunStatus) -> Iterator[tuple[str, float]]:
    for metric, name in _SHOWN_METRICS.items():
        if (value := status.metrics.get(metric)) is not None:
            yield name, value


def _step(pace: PaceStatus) -> str:
    """The seconds of a step, and whether they become more."""
    trend = ""
    if pace.change is not None:
        word = "slower" if pace.change > 0 else "faster"
        trend = f", {abs(pace.change):.0%} {word} than the ten before"
    return f"{pace.step_seconds:.1f} s{trend}"


def _ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"
