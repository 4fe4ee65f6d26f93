"""What the commands share: the consoles of standard output and standard error, and texts."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from treepo.data.prompts import DataReport

OVERRIDES = "Override keys of the file, for example sampling.width=8."
"""The help of every command's KEY=VALUE arguments."""

output = Console()
errors = Console(stderr=True)


def show_data(reports: "Iterable[DataReport]") -> None:
    """Show the contents of each data file, one line each."""
    for report in reports:
        output.print(report.summary(), highlight=False, markup=False, soft_wrap=True)
