"""The `treepo` command. It parses, checks, calls and shows; nothing heavy is imported before it is needed."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from treepo.config.load import load_config
from treepo.errors import TreepoError

app = typer.Typer(
    help="Reinforcement learning for reasoning models whose rollouts are trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_output = Console()
_errors = Console(stderr=True)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


@app.callback()
def _commands() -> None:
    """Make `treepo` a group even while it has few commands."""


@app.command()
def toy(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/toy"),
    seed: Annotated[int, typer.Option(help="Of the data and of the model.")] = 0,
    force: Annotated[bool, typer.Option(help="Make it again even if it is there.")] = False,
) -> None:
    """Make a small model and arithmetic problems that it gets right about two times in five."""
    from treepo.display import show_toy, toy_progress
    from treepo.toy.make import make_toy

    with toy_progress(_output) as progress:
        report = make_toy(out, seed=seed, force=force, progress=progress)
    show_toy(_output, report)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, for example examples/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Train a model: sample trees, grade them, learn from them, hand the new weights to the sampler."""
    run_config = load_config(config, overrides or [])
    from treepo.display import TrainDisplay, show_summary
    from treepo.orchestration.inputs import read_inputs

    inputs = read_inputs(run_config)
    from treepo.orchestration.train import train as run

    try:
        with TrainDisplay(_output, f"{config} -> {run_config.out}", run_config.steps) as display:
            summary = asyncio.run(run(run_config, inputs, display))
    except KeyboardInterrupt:
        _errors.print(f"Interrupted. What was started has ended; what was written is in {run_config.out}/")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_summary(_output, summary, run_config.out)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    try:
        app()
    except TreepoError as error:
        _errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
