"""The parts of every command's terminal output: a title, lines, a live status below them, tables at the end.

If the output is not a terminal, or is one without cursor movement, there is no live status.
"""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TimeElapsedColumn
from rich.table import Table

_TENTHS = 10


def is_live(console: Console) -> bool:
    """Whether a status line can be redrawn in place."""
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet


def live_progress(console: Console, *columns: str | ProgressColumn) -> Progress:
    """A progress bar of these columns and the time elapsed. It disappears when it stops; without a live
    console it draws nothing.
    """
    return Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not is_live(console)
    )


class LiveDisplay:
    """A context manager around a command: prints `title`, then keeps `progress` below all printed lines."""

    def __init__(self, console: Console, title: str, *columns: str | ProgressColumn) -> None:
        self.live = is_live(console)
        self.progress = live_progress(console, *columns)
        self._console = console
        self._title = title

    def __enter__(self) -> Self:
        self._console.print(self._title, style="bold", highlight=False)
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line that stays."""
        self._console.print(text, style=style, highlight=False, soft_wrap=True)

    def line_every_tenth(self, done: int, total: int, text: str) -> None:
        """In place of a progress bar: without a live console, print `text` once for each tenth of `total`."""
        if not self.live and done * _TENTHS // total > (done - 1) * _TENTHS // total:
            self.line(text)


def duration(seconds: float) -> str:
    """A time that a person reads: 95 s, 12 min, 3 h 5 min."""
    seconds = round(max(seconds, 0.0))
    if seconds < 120:
        return f"{seconds} s"
    minutes = seconds // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def value_table(title: str) -> Table:
    """A table of names on the left and values on the right."""
    table = Table(title=title, title_justify="left", show_header=False, pad_edge=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    return table


def show_written(console: Console, folder: Path, files: Iterable[tuple[str, str]]) -> None:
    """List the files in `folder` with their meaning."""
    table = Table(title=f"Written to {folder}/", title_justify="left", show_header=False, box=None)
    for name, meaning in files:
        table.add_row(name, meaning)
    console.print(table, soft_wrap=True)
