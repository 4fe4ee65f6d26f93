"""Texts of models, data files and servers reach the terminal as text, whatever they are."""

import logging
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.logging import RichHandler
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from tests.support.evaluations import config_of, document, graded_problem, prompt_of
from treepo.display.comparison import show_comparison
from treepo.display.evaluation import show_evaluation
from treepo.display.live import LiveDisplay, show_written
from treepo.display.safe_console import SafeConsole
from treepo.errors import DataError, PrintableFormatter, printable
from treepo.evaluation.comparison import compare
from treepo.tree import Verdict

HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "link": "\x1b]8;;https://example.com\x1b\\click\x1b]8;;\x1b\\",
    "8-bit": "\x9b2J\x9d0;owned\x9c",
    "answer back": "\x1b[6n\x1b[c\x05",
    "overwritten": "secret\rpublic\b\b",
    "right to left": "\u202egnp.exe\u2066",
    "markup": "[red]x[/red] [link=https://example.com]y[/link] :bomb: [/]",
}
STYLE = re.compile(r"\x1b\[[0-9;]*m")
"""The styles that rich writes."""


def shown(draw: Callable[[SafeConsole], object]) -> str:
    """What a colour terminal receives."""
    output = StringIO()
    draw(SafeConsole(file=output, width=1000, force_terminal=True, color_system="standard"))
    return output.getvalue()


def plain(text: str) -> str:
    return STYLE.sub("", text)


DRAWN: dict[str, Callable[[SafeConsole, str], object]] = {
    "string": lambda console, text: console.print(text, highlight=False, soft_wrap=True),
    "styled": lambda console, text: console.print(Text(text, "red"), soft_wrap=True),
    "title": lambda console, text: LiveDisplay(console, text).__enter__().__exit__(None, None, None),
    "cell": lambda console, text: console.print(_table(text)),
    "files": lambda console, text: show_written(console, Path(text), [(text, text)]),
    "log": lambda console, text: _log(RichHandler(console=console, show_time=False, show_path=False), text),
}


def _table(text: str) -> Table:
    table = Table(text, title=text)
    table.add_row(text, text)
    return table


def _log(handler: logging.Handler, text: str) -> None:
    handler.handle(logging.LogRecord("treepo", logging.WARNING, "file", 1, "%s", (text,), None))


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN.keys())
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_control_character_of_a_text_reaches_the_terminal(
    text: str, draw: Callable[[SafeConsole, str], object]
) -> None:
    rest = plain(shown(lambda console: draw(console, text)))
    for code in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A", "\r"):  # of the progress bar
        rest = rest.replace(code, "")
    assert rest == printable(rest)


def test_markup_is_text() -> None:
    text = HOSTILE["markup"]
    for name, draw in DRAWN.items():
        assert text in plain(shown(lambda console, draw=draw: draw(console, text))), name


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_one_that_a_terminal_shows(text: str) -> None:
    received = shown(lambda console: console.print(text, highlight=False, soft_wrap=True))
    assert plain(received) == printable(plain(received))


def test_names_in_tables_of_an_evaluation_are_text() -> None:
    name = "[red]\x1b[2Jx"
    problems = [(prompt_of(name, 0), graded_problem(prompt_of(name, 0), [Verdict.CORRECT, Verdict.WRONG]))]
    results = document(config_of("out", 2, (name,)), {name: problems})
    results["failures"] = {f"{name}:1": "[bold]\x1b]52;c;eA==\x07"}
    for draw in (
        lambda console: show_evaluation(console, results, Path(name)),
        lambda console: show_comparison(console, name, name, compare(results, results), name),
    ):
        received = shown(draw)
        assert "[red]\ufffd[2Jx" in received
        assert "\x1b[2J" not in received
        assert "\x1b]" not in received


def test_a_progress_bar_shows_text() -> None:
    def draw(console: SafeConsole) -> None:
        with Progress(TextColumn("{task.description}", markup=False), console=console) as progress:
            progress.add_task(HOSTILE["clipboard"])

    assert "\x1b]" not in shown(draw)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_errors_and_log_lines_are_printable(text: str) -> None:
    assert str(DataError(f"{text}: not found")) == f"{printable(text)}: not found"
    output = StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    try:
        raise ValueError(text)
    except ValueError as error:
        raised = (type(error), error, error.__traceback__)
    handler.handle(logging.LogRecord("treepo", logging.ERROR, "file", 1, "%s", (text,), raised))
    assert output.getvalue() == printable(output.getvalue())


def test_an_error_has_a_bounded_length() -> None:
    lines = str(DataError(f"{'x' * 100_000}: first\nsecond")).split("\n")
    assert len(lines) == 2
    assert len(lines[0]) < 2000
    assert lines[0].endswith("x: first")
