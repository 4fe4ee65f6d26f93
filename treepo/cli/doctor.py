"""`treepo doctor`: checks this machine."""

import time
from typing import Annotated

import typer

from treepo.cli.console import errors, output
from treepo.errors import EXIT_INTERRUPTED


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Skip gloo, nccl, engine and trainer; takes seconds.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="Run this check only; may be repeated.")] = None,
) -> None:
    """Check this machine: versions, devices, limits, network; then run a real engine and trainer.

    The exit code is 1 if a check failed. On every node of a Slurm job: srun --label treepo doctor
    """
    import socket

    from treepo.display.doctor import show_checks, show_report
    from treepo.doctor.check import Report
    from treepo.doctor.checklist import select_checks
    from treepo.doctor.runner import run_checks
    from treepo.doctor.software import installed_version

    started = time.perf_counter()
    console = errors if json else output
    try:
        results = show_checks(console, run_checks(select_checks(only), quick=quick), lines=not json)
    except KeyboardInterrupt:
        errors.print("Interrupted; the check that ran was killed.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    report = Report(socket.gethostname(), installed_version("treepo"), results)
    if json:
        output.print_json(data=report.as_json())
    else:
        show_report(output, report, time.perf_counter() - started)
    raise typer.Exit(report.exit_code)
