"""`treepo doctor`: check this machine."""

import time
from typing import Annotated

import typer

from treepo.cli.console import errors, output
from treepo.errors import EXIT_INTERRUPTED


def doctor(
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of lines.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Without collectives, engine and trainer: seconds.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="One check by its name; again for each.")] = None,
) -> None:
    """Check this machine: versions, devices, limits, network, and a real engine and trainer on a toy.

    Exit code 1 where a check failed. On every node of a job: srun --label treepo doctor
    """
    import socket

    from treepo.display.doctor import show_report, watch
    from treepo.doctor.checks import chosen
    from treepo.doctor.examine import examine_all
    from treepo.doctor.outcome import Report
    from treepo.doctor.software import installed_version

    started = time.perf_counter()
    console = errors if json else output
    try:
        results = watch(console, examine_all(chosen(only), quick), lines=not json)
    except KeyboardInterrupt:
        errors.print("Interrupted. What was started has ended.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    report = Report(socket.gethostname(), installed_version("treepo"), results)
    if json:
        output.print_json(data=report.as_json())
    else:
        show_report(output, report, time.perf_counter() - started)
    raise typer.Exit(report.exit_code)
