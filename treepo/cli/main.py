"""The `treepo` command. Commands import heavy modules only when they need them."""

import errno
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator

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
from treepo.data.temporary_folder import keep_compiled_code
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

# Of an OSError that reading or writing a file can raise, whatever the program does.
_OF_THE_MACHINE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE),
        *(
            errno.EACCES,
            errno.EPERM,
            errno.ENOENT,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.ENAMETOOLONG,
            errno.ELOOP,
        ),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)
_NAMELESS = "standard output, or a file without a name"


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
    threading.excepthook = _thread_failed
    # A traceback of a reward function goes to the terminal, where its author sees it.
    if logging.lastResort is not None:
        logging.getLogger("treepo.rewards").addHandler(logging.lastResort)
    sys.exit(exit_code_of(app))


def exit_code_of(command: Callable[[], object]) -> int:
    """Run the command; show a TreepoError, or an OSError of the machine, as one line."""
    exit_code = 0
    try:
        command()
    except* TreepoError as group:
        # Many tasks may fail for the same reason, which is shown once.
        for text, error in {str(error): error for error in _single(group)}.items():
            _show_error(text)
            exit_code = max(exit_code, error.exit_code)
    except* OSError as group:
        found = list(_single(group))
        if not all(error.errno in _OF_THE_MACHINE for error in found):
            raise  # a fault of ours
        for text in dict.fromkeys(f"{error.filename or _NAMELESS}: {error.strerror}" for error in found):
            _show_error(text)
        exit_code = max(exit_code, 1)
    return exit_code


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A full disk stops TensorBoard's thread too; the run meets the same error at its next write."""
    error = failure.exc_value
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        logging.getLogger(__name__).warning("%s: %s", error.filename or failure.thread, error.strerror)
    else:
        threading.__excepthook__(failure)


def _show_error(text: str) -> None:
    errors.print(f"[bold red]error:[/bold red] {escape(text)}", highlight=False, soft_wrap=True)


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
        warnings.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    warnings.addFilter(lambda record: record.exc_info is None)
    for package in ("treepo", "sglang_rollout"):
        logging.getLogger(package).addHandler(warnings)


def _single[Error: BaseException](group: BaseExceptionGroup[Error]) -> Iterator[Error]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _single(error)
        else:
            yield error
