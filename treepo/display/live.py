"""The frame of what a person sees of a command: a title, lines, a live status below them, tables at the end.

Where the output is not a terminal, or is one without cursor movement, only lines and tables are left.
"""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TimeElapsedColumn
from rich.table import Table


def is_live(console: Console) -> bool:
    """Whether a status can be redrawn in place."""
    return console.is_terminal and not console.is_dumb_terminal


def live_progress(console: Console, *columns: str | ProgressColumn) -> Progress:
    """These columns and the time elapsed, gone when it stops; nothing where the output is not live."""
    return Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not is_live(console)
    )


class LiveDisplay:
    """A context manager around a command: prints `title`, then keeps `progress` below what is printed."""

    def __init__(self, console: Console, title: str, *columns: str | ProgressColumn) -> None:
        self.live = is_live(console)
        self.progress = live_progress(console, *columns)
        self._console = console
        self._title = title

    def __enter__(self) -> Self:
        self._console.print(f"[bold]{self._title}[/bold]", highlight=False)
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
        """A line that stays."""
        self._console.print(text, style=style, highlight=False, soft_wrap=True)


def value_table(title: str) -> Table:
    """Names on the left, values on the right."""
    table = Table(title=title, title_justify="left", show_header=False, pad_edge=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    return table


def show_written(console: Console, folder: Path, files: Iterable[tuple[str, str]]) -> None:
    """What each file in `folder` is."""
    table = Table(title=f"Written to {folder}/", title_justify="left", show_header=False, box=None)
    for name, what in files:
        table.add_row(name, what)
    console.print(table, soft_wrap=True)
