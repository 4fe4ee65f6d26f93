"""The `treepo` command. It parses, checks, calls and shows; nothing heavy is imported before it is needed."""

import asyncio
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from treepo.config.load import load_as, load_config
from treepo.errors import TreepoError

if TYPE_CHECKING:
    from treepo.data import DataReport

app = typer.Typer(
    help="Reinforcement learning for reasoning models whose rollouts are trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_output = Console()
_errors = Console(stderr=True)

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
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint in the run folder; where there is none, begin.",
        ),
    ] = False,
) -> None:
    """Train a model: sample trees, grade them, learn from them, hand the new weights to the sampler."""
    run_config = load_config(config, overrides or [])
    from treepo.display import TrainDisplay, show_resume, show_summary
    from treepo.orchestration.inputs import read_inputs

    inputs = read_inputs(run_config)
    _show_data(inputs.reports)
    from treepo.orchestration.checkpoints import newest
    from treepo.orchestration.resume import find_resume

    origin = find_resume(run_config, inputs) if resume else None
    if resume:
        show_resume(_output, origin, run_config.out)
    from treepo.orchestration.train import train as run

    try:
        with TrainDisplay(_output, f"{config} -> {run_config.out}", run_config.steps) as display:
            summary = asyncio.run(run(run_config, inputs, display, origin))
    except KeyboardInterrupt:
        _errors.print(f"Interrupted. What was started has ended; what was written is in {run_config.out}/")
        if (last := newest(run_config.out)) is not None:
            _errors.print(f"--resume goes on from step {last[1].step}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_summary(_output, summary, run_config.out)


@app.command()
def rollout(
    config: Annotated[Path, typer.Argument(help="A YAML file, for example examples/rollout.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Sample trees for a file of prompts, without training and without grading: one tree a line."""
    from treepo.config.rollout import RolloutConfig

    rollout_config = load_as(RolloutConfig, config, overrides or [])
    from treepo.orchestration.rollout_inputs import read_inputs

    inputs = read_inputs(rollout_config)
    _show_data([inputs.prompts.report])
    from treepo.orchestration.rollout import rollout as run
    from treepo.rollout_display import RolloutDisplay, show_rollout

    try:
        with RolloutDisplay(_output, f"{config} -> {rollout_config.out}") as display:
            summary = asyncio.run(run(rollout_config, inputs, display))
    except KeyboardInterrupt:
        _errors.print(
            f"Interrupted. What was started has ended; the trees so far are in {rollout_config.out}/"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_rollout(_output, summary, rollout_config.out)


def _show_data(reports: "Iterable[DataReport]") -> None:
    """What each file holds, a line each."""
    for report in reports:
        _output.print(report.summary(), highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: an error that a user can understand is one line."""
    # The progress bars of libraries would draw over ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _show_warnings()
    # A reward function's own traceback is for its author, who sits at the terminal.
    if logging.lastResort is not None:
        logging.getLogger("treepo.rewards").addHandler(logging.lastResort)
    exit_code = 0
    try:
        app()
    except* TreepoError as group:
        # What many tasks wait for fails in all of them: that is said once.
        for text, error in {str(error): error for error in _single(group)}.items():
            _errors.print(f"[bold red]error:[/bold red] {escape(text)}", highlight=False, soft_wrap=True)
            exit_code = max(exit_code, error.exit_code)
    sys.exit(exit_code)


def _show_warnings() -> None:
    """On the terminal too, whatever else happens to the log; what ends a run is shown as an error instead."""
    warnings = RichHandler(logging.WARNING, _errors, show_time=False, show_path=False)
    warnings.addFilter(lambda record: record.exc_info is None)
    for package in ("treepo", "sglang_rollout"):
        logging.getLogger(package).addHandler(warnings)


def _single(group: BaseExceptionGroup[TreepoError]) -> Iterator[TreepoError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _single(error)
        else:
            yield error
