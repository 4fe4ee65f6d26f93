"""The terminal output of `treepo status`."""

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from treepo.run_status import RunStatus

_SHOWN_METRICS = ("reward", "accuracy", "tokens_per_second")


def show_status(console: Console, folder: Path, status: RunStatus) -> None:
    """Show the state of a run, its step and phase, and everything that waits."""
    table = Table(title=f"{folder}/", title_justify="left", show_header=False, pad_edge=False)
    table.add_row("state", _state(status))
    if status.reason:
        table.add_row("reason", escape(status.reason))
    table.add_row("process", f"{status.pid} on {escape(status.host)}")
    table.add_row("last sign of life", _ago(status.age()))
    if status.steps is not None:
        table.add_row("steps done", f"{status.step} of {status.steps}")
    if status.state == "running":
        table.add_row("phase", f"{escape(status.phase)}, begun {_ago(time.time() - status.phase_since)}")
        for wait in status.waits:
            table.add_row("waits", escape(f"{wait.who}, {_for(wait.seconds)}, for {wait.whom}"))
        for name, state in status.engines.items():
            table.add_row(escape(name), escape(state))
    for name in _SHOWN_METRICS:
        if (value := status.metrics.get(name)) is not None:
            table.add_row(f"last {name}", f"{value:.3g}")
    console.print(table, highlight=False, soft_wrap=True)


def _state(status: RunStatus) -> str:
    if fault := status.fault():
        return f"[bold red]dead or stuck[/bold red]: {escape(fault)}"
    return f"[bold]{status.state}[/bold]"


def _ago(seconds: float) -> str:
    return f"{_for(seconds)} ago"


def _for(seconds: float) -> str:
    seconds = round(max(seconds, 0.0))
    if seconds < 120:
        return f"{seconds} s"
    minutes = seconds // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
