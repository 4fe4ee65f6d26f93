"""`treepo toy`: makes the toy model and its problems."""

from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import output, progress_console


def toy(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write to.", show_default="runs/toy, or runs/toy-moe with --moe"),
    ] = None,
    moe: Annotated[
        bool,
        typer.Option("--moe", help="A mixture of experts (Qwen3-MoE), not a dense model (Qwen2)."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data and the model.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Make it again even if it exists.")] = False,
) -> None:
    """Make a toy model, and arithmetic problems of which it solves about two in five."""
    from treepo.display.train import show_toy, toy_progress
    from treepo.toy.make import make_toy
    from treepo.toy.recipe import MIXTURE, RECIPE

    folder = out or Path("runs/toy-moe" if moe else "runs/toy")
    with toy_progress(progress_console) as progress:
        report = make_toy(
            folder, seed=seed, force=force, progress=progress, recipe=MIXTURE if moe else RECIPE
        )
    show_toy(output, report)
