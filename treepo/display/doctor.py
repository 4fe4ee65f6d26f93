"""Terminal output of `treepo doctor`: a line for each check that has ended, below them the one that runs."""

from collections.abc import Iterable

from rich.console import Console
from rich.progress import SpinnerColumn, TextColumn
from rich.text import Text

from treepo.display.live import live_progress
from treepo.doctor.check import Check, CheckResult, Report, Status
from treepo.doctor.checklist import CHECKS

_STYLES = {Status.PASS: "green", Status.FAIL: "bold red", Status.SKIP: "dim"}


def show_checks(
    console: Console, steps: Iterable[tuple[Check, CheckResult | None]], *, lines: bool
) -> list[CheckResult]:
    """Run through the checks and return their results. lines: print a line for each; without them only the
    check that runs is shown.
    """
    results: list[CheckResult] = []
    progress = live_progress(console, SpinnerColumn(), TextColumn("{task.description}", markup=False))
    task = progress.add_task("", total=None)
    with progress:
        for check, result in steps:
            if result is None:
                progress.reset(task, description=f"{check.name}, at most {check.deadline:g} s")
                continue
            results.append(result)
            if lines:
                show_result(console, result)
    return results


def show_result(console: Console, result: CheckResult) -> None:
    """One line; below it a failure's remedy, and the last output of a check that crashed."""
    width = max(len(check.name) for check in CHECKS)
    outcome, indent = result.outcome, " " * (width + 6)
    style = _STYLES[outcome.status]
    seconds = f" ({result.seconds:.0f} s)" if result.seconds >= 1 else ""
    line = Text.assemble(
        (outcome.status.value, style), f"  {result.name:{width}}  {outcome.found}", (seconds, "dim")
    )
    console.print(line, soft_wrap=True)
    if outcome.remedy:
        console.print(f"{indent}→ {outcome.remedy}", highlight=False, soft_wrap=True)
    for text in result.output:
        console.print(f"{indent}{text}", style="dim", highlight=False, soft_wrap=True)


def show_report(console: Console, report: Report, seconds: float) -> None:
    """The last line: how many checks passed, failed and were skipped."""
    failures = report.count(Status.FAIL)
    console.print(
        f"{report.host}: {report.count(Status.PASS)} passed, {failures} failed, "
        f"{report.count(Status.SKIP)} skipped, in {seconds:.0f} s",
        style="bold red" if failures else "bold green",
        highlight=False,
        soft_wrap=True,
    )
