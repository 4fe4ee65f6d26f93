"""The `treepo` command: parses, checks, calls and shows. Nothing heavy is imported before it is needed."""

import logging
import os
import sys
from collections.abc import Iterator

import typer
from rich.logging import RichHandler
from rich.markup import escape

from treepo.cli.console import errors
from treepo.cli.convert import convert
from treepo.cli.doctor import doctor
from treepo.cli.evaluate import evaluate
from treepo.cli.launch import launch
from treepo.cli.plan import plan
from treepo.cli.rollout import rollout
from treepo.cli.toy import toy
from treepo.cli.train import train
from treepo.errors import TreepoError

app = typer.Typer(
    help="Reinforcement learning for reasoning models whose rollouts are trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (toy, train, launch, rollout, plan, convert):
    app.command()(command)
app.command(name="eval")(evaluate)
app.command()(doctor)


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
            errors.print(f"[bold red]error:[/bold red] {escape(text)}", highlight=False, soft_wrap=True)
            exit_code = max(exit_code, error.exit_code)
    sys.exit(exit_code)


def _show_warnings() -> None:
    """On the terminal too, whatever else happens to the log; what ends a run is shown as an error instead."""
    warnings: logging.Handler
    if errors.is_terminal:
        warnings = RichHandler(logging.WARNING, errors, show_time=False, show_path=False)
    else:  # a line each, however long: a file has no width
        warnings = logging.StreamHandler()
        warnings.setLevel(logging.WARNING)
        warnings.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    warnings.addFilter(lambda record: record.exc_info is None)
    for package in ("treepo", "sglang_rollout"):
        logging.getLogger(package).addHandler(warnings)


def _single(group: BaseExceptionGroup[TreepoError]) -> Iterator[TreepoError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _single(error)
        else:
            yield error
