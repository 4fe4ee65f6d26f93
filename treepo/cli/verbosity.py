"""How much a command says on the terminal: `-q` and `-v`, which every command takes."""

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

from treepo.cli.console import errors, progress_console
from treepo.errors import ConfigError, PrintableFormatter

_PACKAGES = ("treepo", "sglang_rollout")
_Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show results, warnings and errors only, no progress.")
]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log too, as in log.txt.")]
_shown: list[logging.Handler] = []


def with_verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options -q and -v."""

    @wraps(command)
    def run(*arguments: Any, quiet: bool, verbose: bool, **options: Any) -> Any:
        _set(quiet=quiet, verbose=verbose)
        return command(*arguments, **options)

    added = {"quiet": _Quiet, "verbose": _Verbose}
    signature = inspect.signature(command)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in added.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *options])  # type: ignore[reportAttributeAccessIssue]  # what inspect reads
    run.__annotations__ = command.__annotations__ | added
    return run


def verbosity_flags() -> list[str]:
    """The options that give another command the verbosity of this one."""
    if progress_console.quiet:
        return ["--quiet"]
    return ["--verbose"] if any(handler.level <= logging.INFO for handler in _shown) else []


def show_warnings() -> None:
    """Show warnings on the terminal, wherever the log goes.

    Warnings with a traceback are left out: the error that ends a run is shown by itself.
    """
    shown: logging.Handler
    if errors.is_terminal:
        shown = RichHandler(logging.WARNING, errors, show_time=False, show_path=False)
    else:  # one line each, however long: a file has no width
        shown = logging.StreamHandler()
        shown.setLevel(logging.WARNING)
        shown.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    shown.addFilter(lambda record: record.exc_info is None)
    _shown.append(shown)
    for package in _PACKAGES:
        logging.getLogger(package).addHandler(shown)


def _set(*, quiet: bool, verbose: bool) -> None:
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other: give one of them")
    progress_console.quiet = quiet
    if verbose:
        for handler in _shown:
            handler.setLevel(logging.INFO)
        for package in _PACKAGES:
            logging.getLogger(package).setLevel(logging.INFO)
