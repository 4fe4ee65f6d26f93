"""The `treepo` command. Commands import heavy modules only when they need them."""

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from treepo.cli.console import output
from treepo.cli.convert import convert
from treepo.cli.doctor import doctor
from treepo.cli.evaluate import evaluate
from treepo.cli.failures import show_failure
from treepo.cli.init import init
from treepo.cli.launch import launch
from treepo.cli.plan import plan
from treepo.cli.rollout import rollout
from treepo.cli.status import status
from treepo.cli.toy import toy
from treepo.cli.train import train
from treepo.cli.verbosity import show_warnings, with_verbosity
from treepo.cli.view import view
from treepo.data.temporary_folder import keep_compiled_code
from treepo.ending import ignore_signals, leave
from treepo.errors import PrintableFormatter

app = typer.Typer(
    help="Reinforcement learning for reasoning models whose rollouts are trees.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (init, toy, train, launch, status, view, rollout, plan, convert, doctor):
    app.command()(with_verbosity(command))
app.command(name="eval")(with_verbosity(evaluate))


def _show_version(wanted: bool) -> None:
    if wanted:
        from treepo.doctor.software import installed_version

        output.print(
            f"treepo {installed_version('treepo') or '(not installed as a package)'}", highlight=False
        )
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command. A TreepoError becomes one line on standard error and an exit code, and so does a file
    that the machine does not let a command read or write.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text, or the terminal no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Progress bars of libraries would draw over ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    show_warnings()
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
