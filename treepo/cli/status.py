"""`treepo status`: what a run does now, and who waits for whom."""

from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import output


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, evaluation or rollout.")],
) -> None:
    """Show whether a run is alive, its step and phase, and who waits for whom and since when; of a finished
    run, whether it learned.
    """
    from treepo.display.status import show_status
    from treepo.run_status import read_status
    from treepo.training.conclusion import conclusion_of

    found = read_status(run)
    show_status(output, run, found, conclusion_of(run) if found.state == "finished" else ())
