"""Terminal output of `treepo eval --compare`: a table of paired differences."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from treepo.evaluation.comparison import Difference


def show_comparison(
    console: Console, first: str, second: str, differences: Sequence[Difference], warning: str | None
) -> None:
    """Print a table of A = `first` and B = `second`. A difference is bold if its interval excludes 0.

    warning: that of `different_conditions`.
    """
    console.print(f"A: {first}\nB: {second}", highlight=False, soft_wrap=True)
    if warning is not None:
        console.print(Text(warning, "yellow"), soft_wrap=True)
    title = "Percent, over the problems that both have"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in ("", "metric", "problems", "A", "B", "B - A", "95% interval"):
        table.add_column(head, justify="left" if head in ("", "metric") else "right", no_wrap=True)
    before = None
    for row in differences:
        if before not in (None, row.benchmark):
            table.add_section()
        difference = row.difference
        clear = difference.low > 0 or difference.high < 0
        change = f"{100 * difference.value:+.1f}"
        table.add_row(
            "" if row.benchmark == before else row.benchmark,
            row.metric.replace("_", " "),
            str(difference.problems),
            f"{100 * row.first:.1f}",
            f"{100 * row.second:.1f}",
            Text(change, "bold") if clear else change,
            f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}",
        )
        before = row.benchmark
    console.print(table)
