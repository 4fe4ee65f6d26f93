"""`treepo toy`: make the toy model and its problems."""

from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import output


def toy(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/toy"),
    seed: Annotated[int, typer.Option(help="Of the data and of the model.")] = 0,
    force: Annotated[bool, typer.Option(help="Make it again even if it is there.")] = False,
) -> None:
    """Make a small model and arithmetic problems that it gets right about two times in five."""
    from treepo.display.train import show_toy, toy_progress
    from treepo.toy.make import make_toy

    with toy_progress(output) as progress:
        report = make_toy(out, seed=seed, force=force, progress=progress)
    show_toy(output, report)
