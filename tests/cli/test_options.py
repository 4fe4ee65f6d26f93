"""What every command has: -q, -v, completion in a shell; and --version."""

import io
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from treepo.cli import verbosity
from treepo.cli.console import output, progress_console
from treepo.cli.main import app
from treepo.cli.overrides import complete
from treepo.cli.verbosity import show_warnings, verbosity_flags, with_verbosity
from treepo.display.live import LiveDisplay
from treepo.display.safe_console import SafeConsole
from treepo.errors import ConfigError

log = logging.getLogger("treepo.tests")


@pytest.fixture
def logging_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("treepo", "sglang_rollout")]
    before = [(logger.level, [*logger.handlers]) for logger in loggers]
    monkeypatch.setattr(verbosity, "_shown", [])
    yield
    progress_console.quiet = False
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


def run(*arguments: str) -> tuple[list[str], list[str]]:
    """Standard output and standard error of a command, and the flags that it would pass on."""

    def command(step: int) -> None:
        progress_console.print(f"step {step}")
        log.info("detail")
        log.warning("beware")
        output.print(f"result {' '.join(verbosity_flags())}".strip())

    one = typer.Typer()
    one.command()(with_verbosity(command))
    result = CliRunner().invoke(one, ["1", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout.splitlines(), result.stderr.splitlines()


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize(
    ("flags", "said", "logged"),
    [
        ((), ["step 1", "result"], ["beware"]),
        (("-q",), ["result --quiet"], ["beware"]),
        (("-v",), ["step 1", "result --verbose"], ["detail", "beware"]),
        (("--verbose",), ["step 1", "result --verbose"], ["detail", "beware"]),
    ],
)
def test_quiet_hides_progress_and_verbose_shows_the_log(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], said: list[str], logged: list[str]
) -> None:
    shown = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", shown)  # of the handler; the command has its own
        show_warnings()
    assert run(*flags) == (said, [])
    assert [line.split()[-1] for line in shown.getvalue().splitlines()] == logged


@pytest.mark.usefixtures("logging_restored")
def test_quiet_and_verbose_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--quiet and --verbose exclude each other"):
        run("-q", "-v")


def test_a_quiet_display_draws_nothing_and_leaves_standard_error_alone() -> None:
    drawn, before = io.StringIO(), sys.stderr
    console = SafeConsole(file=drawn, force_terminal=True, quiet=True)
    with LiveDisplay(console, "title") as display:
        assert not display.live
        assert sys.stderr is before
        display.line("step 1")
    assert drawn.getvalue() == ""


def test_every_command_takes_both_and_the_program_tells_its_version() -> None:
    group = typer.main.get_command(app)
    with group.make_context("treepo", ["status", "x"], resilient_parsing=True) as context:
        names = group.list_commands(context)  # type: ignore[reportAttributeAccessIssue]  # it is a group
        for name in names:
            parameters = group.get_command(context, name).params  # type: ignore[reportAttributeAccessIssue]
            options = {option for parameter in parameters for option in parameter.opts}
            assert {"-q", "--quiet", "-v", "--verbose"} <= options, name
    assert CliRunner().invoke(app, ["--version"]).stdout == f"treepo {version('treepo')}\n"


@pytest.mark.parametrize(
    ("command", "begun", "keys"),
    [
        ("train", "sampling.wi", ["sampling.width="]),
        ("launch", "trainer.parallel.te", ["trainer.parallel.tensor="]),
        ("rollout", "prompts.tr", []),
        ("eval", "model.u", ["model.url="]),
    ],
)
def test_a_shell_completes_keys_of_the_commands_configuration(
    command: str, begun: str, keys: list[str]
) -> None:
    context: Any = SimpleNamespace(command=SimpleNamespace(name=command))
    assert complete(context, begun) == keys
