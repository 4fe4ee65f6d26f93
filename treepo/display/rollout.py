"""Terminal output of `treepo rollout`: a progress bar (a line every tenth outside a terminal), a table."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.text import Text

from treepo.config.rollout import RolloutConfig
from treepo.config.truncation import sampling_line
from treepo.data.output_folder import CONFIG, LOG, SUMMARY, TREES
from treepo.display.live import LiveDisplay, show_written, value_table
from treepo.rollout.sample_file import Summary
from treepo.rollout.stats import Stats

_FAILURES = 5  # shown in the table


class RolloutDisplay(LiveDisplay):
    """The `Reporter` of treepo.rollout.sample_file; a context manager around the rollout."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(
            console,
            title,
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("trees  {task.fields[numbers]}", markup=False),
        )
        self._task = self.progress.add_task("start engine", total=None, numbers="")
        self._prompts = 0

    def __enter__(self) -> Self:
        super().__enter__()
        if not self.live:
            self.line("start engine")
        return self

    def sampling(self, prompts: int) -> None:
        self._prompts = prompts
        self.progress.update(self._task, description="sample", total=prompts)

    def tree(self, done: int, stats: Stats, seconds: float) -> None:
        numbers = (
            f"{stats.leaves} leaves  {stats.decoded_tokens:,} tokens decoded  "
            f"{stats.decoded_tokens / seconds:.0f} tokens/s"
        )
        if stats.failed_trees:
            numbers += f"  {stats.failed_trees} failed"
        self.progress.update(self._task, completed=done, numbers=numbers)
        self.line_every_tenth(done, self._prompts, f"{done}/{self._prompts} trees  {numbers}")


def show_rollout(console: Console, summary: Summary, config: RolloutConfig) -> None:
    """The end of a rollout: how was sampled, its numbers, its cost, its files."""
    line = sampling_line(config.sampling.model_dump(), "prompt")
    console.print(line, highlight=False, soft_wrap=True)
    table = value_table("What was sampled")
    table.add_row("trees", f"{summary.trees} of {summary.prompts} prompts")
    table.add_row("leaves", f"{summary.leaves:,}")
    table.add_row("tokens decoded", f"{summary.decoded_tokens:,}")
    table.add_row(
        "the same leaves one by one", f"{summary.total_tokens:,}  ({summary.total_over_unique:.2f}x)"
    )
    table.add_row("prefixes found in the cache", f"{summary.cached_token_ratio:.1%}")
    table.add_row("tokens/s", f"{summary.tokens_per_second:,.0f}")
    table.add_row("leaves/s", f"{summary.trajectories_per_second:.1f}")
    table.add_row("seconds", f"{summary.seconds:.1f}")
    if summary.failed_requests:
        table.add_row("failed requests", f"{summary.failed_requests} of {summary.requests}")
    for failure in summary.failures[:_FAILURES]:
        table.add_row(Text(f"failed: {failure.prompt_id}", "red"), failure.reason)
    if len(summary.failures) > _FAILURES:
        table.add_row(Text("failed", "red"), f"and {len(summary.failures) - _FAILURES} more, in {SUMMARY}")
    console.print(table)
    files = (
        (TREES, "every tree: segments, log-probs, leaves; not graded"),
        (SUMMARY, "this summary"),
        (CONFIG, "the effective configuration"),
        (LOG, "the log"),
    )
    show_written(console, config.out, files)
