"""Ends a command early: an error is one line for each cause that a user can act on, a signal one line."""

import asyncio
import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import SIGINT, Signals

import typer
from rich.text import Text

from treepo.cli.console import errors
from treepo.ending import Stopped, Stopper
from treepo.errors import TreepoError, one_line, printable, without_colors

_log = logging.getLogger(__name__)
# Of an OSError that reading or writing a file can raise, whatever the program does.
_OF_THE_MACHINE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE),
        *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EPIPE),
        *(errno.ENODEV, errno.ENXIO, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)
_NAMELESS = "standard output, or a file without a name"
ALL_ENDED = "All processes have ended"


def of_the_machine(error: BaseException | None) -> bool:
    """Whether the error says that the machine does not let a file be read or written."""
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def show_failure(error: BaseException) -> int | None:
    """Show one line for each cause of the error, and return the exit code; None if some cause is a fault of
    ours, which needs its traceback.

    Many tasks may fail for the same reason, which is shown once. An error that hides another, as a full disk
    while the folder is closed hides why the run ended, comes after it.
    """
    lines: dict[str, None] = {}
    exit_code, ours = 0, False
    for cause in _causes(error):
        if isinstance(cause, asyncio.CancelledError):  # of a task beside the one that failed
            continue
        text = line_of(cause)
        if text is None:
            ours = True
            continue
        lines[text] = None
        exit_code = max(exit_code, cause.exit_code if isinstance(cause, TreepoError) else 1)
    for text in lines:
        errors.print(Text.assemble(("error:", "bold red"), f" {printable(text)}"), soft_wrap=True)
    return None if ours or not lines else exit_code


def line_of(error: BaseException) -> str | None:
    """The error in one line; None if it is a fault of ours."""
    if isinstance(error, TreepoError):
        return one_line(error)
    if isinstance(error, OSError) and of_the_machine(error):
        return f"{error.filename or _NAMELESS}: {error.strerror}"
    if type(error).__module__.split(".")[0] == "ray":  # the command line does not import Ray
        return f"Ray: {type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: BaseException) -> str:
    lines = without_colors(str(error)).strip().splitlines()
    return lines[0] if lines else "it does not say why"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group, each after the one that it hides if both can be shown in a line."""
    hidden = None if error.__suppress_context__ else error.__context__
    if of_the_machine(error) and hidden is not None:
        yield from (cause for cause in _causes(hidden) if line_of(cause) is not None)
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _causes(one)
    else:
        yield error


@contextmanager
def stoppable(left: Callable[[], str], *, cut_short: str = ALL_ENDED) -> Iterator[Stopper]:
    """Let the body be ended by SIGTERM or Ctrl-C: clean, with one line and exit code 143 or 130.

    left: says in a few words what the command leaves, and how it can go on. cut_short: says what has ended if
    a second signal or the deadline cuts the clean-up short.
    """

    def farewell(by: Signals, ended: str = ALL_ENDED) -> str:
        name = "" if by is SIGINT else f" by {by.name}"
        return f"Interrupted{name}. {ended}; {left()}"

    stopper = Stopper(lambda by: farewell(by, cut_short))
    with stopper:
        try:
            yield stopper
        except (Exception, BaseExceptionGroup, Stopped) as error:
            if stopper.received is None:
                raise
            if not isinstance(error, Stopped) and show_failure(error) is None:
                _log.exception("while the command ended")
            errors.print(farewell(stopper.received), highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(128 + stopper.received) from None
