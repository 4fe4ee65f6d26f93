"""`treepo toy`: makes the toy model and its problems."""

from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import output, progress_console


def toy(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/toy"),
    seed: Annotated[int, typer.Option(help="Seed of the data and the model.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Make it again even if it exists.")] = False,
) -> None:
    """Make a toy model, and arithmetic problems of which it solves about two in five."""
    from treepo.display.train import show_toy, toy_progress
    from treepo.toy.make import make_toy

    with toy_progress(progress_console) as progress:
        report = make_toy(out, seed=seed, force=force, progress=progress)
    show_toy(output, report)
