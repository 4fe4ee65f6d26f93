"""Terminal output of `treepo convert`: a progress bar, and one line about the result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_bridge.convert import Converted


@contextmanager
def convert_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yields a `Progress` of `convert`, which draws a bar if the output is a terminal."""
    bar = Progress(
        TextColumn("tensors"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or console.is_dumb_terminal,
    )
    task = bar.add_task("", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_converted(console: Console, converted: Converted, target: Path, seconds: float) -> None:
    """Print one line about the folder that was written."""
    console.print(
        f"{target}/: a {converted.what} of {converted.parameters:,} parameters, {converted.dtype}, "
        f"in {seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
