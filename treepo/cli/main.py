"""The `treepo` command. Commands import heavy modules only when they need them."""

import io
import logging
import os
import sys
from collections.abc import Callable

import typer
from rich.logging import RichHandler

from treepo.cli.console import errors
from treepo.cli.convert import convert
from treepo.cli.doctor import doctor
from treepo.cli.evaluate import evaluate
from treepo.cli.failures import show_failure
from treepo.cli.launch import launch
from treepo.cli.plan import plan
from treepo.cli.rollout import rollout
from treepo.cli.status import status
from treepo.cli.toy import toy
from treepo.cli.train import train
from treepo.cli.view import view
from treepo.data.temporary_folder import keep_compiled_code
from treepo.ending import ignore_signals, leave
from treepo.errors import PrintableFormatter

app = typer.Typer(
    help="Reinforcement learning for reasoning models whose rollouts are trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (toy, train, launch, status, view, rollout, plan, convert):
    app.command()(command)
app.command(name="eval")(evaluate)
app.command()(doctor)


def main() -> None:
    """Run a command. A TreepoError becomes one line on standard error and an exit code, and so does a file
    that the machine does not let a command read or write.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text, or the terminal no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Progress bars of libraries would draw over ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _show_warnings()
    keep_compiled_code()  # before torch is imported
    # A traceback of a reward function goes to the terminal, where its author sees it.
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())
        logging.getLogger("treepo.rewards").addHandler(logging.lastResort)
    try:
        exit_code = exit_code_of(app)
    finally:
        ignore_signals()
    leave(exit_code)


def exit_code_of(command: Callable[[], object]) -> int:
    """Run the command; show a TreepoError, or an OSError of the machine, as one line."""
    try:
        command()
    except (Exception, BaseExceptionGroup) as error:
        exit_code = show_failure(error)
        if exit_code is None:
            raise
        return exit_code
    return 0


def _show_warnings() -> None:
    """Show warnings on the terminal, wherever the log goes.

    Warnings with a traceback are left out: the error that ends a run is shown by itself.
    """
    warnings: logging.Handler
    if errors.is_terminal:
        warnings = RichHandler(logging.WARNING, errors, show_time=False, show_path=False)
    else:  # one line each, however long: a file has no width
        warnings = logging.StreamHandler()
        warnings.setLevel(logging.WARNING)
        warnings.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    warnings.addFilter(lambda record: record.exc_info is None)
    for package in ("treepo", "sglang_rollout"):
        logging.getLogger(package).addHandler(warnings)
