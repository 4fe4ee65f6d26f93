"""Terminal output of `treepo eval`: a progress bar (a line every tenth outside a terminal), then tables."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table
from rich.text import Text

from treepo.config.truncation import sampling_line
from treepo.data.inputs import EvaluationInputs
from treepo.data.output_folder import CONFIG, LOG, TREES
from treepo.display.live import LiveDisplay, show_written, value_table
from treepo.evaluation.folder import PLOT, REPORT, SAMPLES
from treepo.evaluation.metrics import ProblemResult
from treepo.evaluation.results import (
    RESULTS,
    percent_and_interval,
    score_columns,
    score_rows,
    unanswered,
)
from treepo.rollout.stats import Stats
from treepo.tree import Verdict

_FAILURES = 5  # shown in the table


class EvaluationDisplay(LiveDisplay):
    """The `Reporter` of treepo.evaluation.evaluate; a context manager around the evaluation."""

    def __init__(self, console: Console, title: str, inputs: EvaluationInputs) -> None:
        super().__init__(
            console,
            title,
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("problems  {task.fields[numbers]}", markup=False),
        )
        self._inputs = inputs
        self._task = self.progress.add_task("read", total=None, numbers="")
        self._problems = self._done = self._failed = 0
        self._graded = self._correct = 0  # responses

    def __enter__(self) -> Self:
        super().__enter__()
        for benchmark in self._inputs.benchmarks:
            config, report = benchmark.config, benchmark.report
            of_file = f" of {report.usable}" if len(benchmark.prompts) < report.usable else ""
            map_name = f", columns of the shipped map `{config.shipped_map}`" if config.shipped_map else ""
            self.line(f"{config.label}: {len(benchmark.prompts)}{of_file} problems{map_name}")
            if report.skipped or report.duplicates:
                self.line(f"  {report.summary()}")
        return self

    def starting(self) -> None:
        self.progress.update(self._task, description="start engine")
        if not self.live:
            self.line("start engine")

    def sampling(self, problems: int, finished: int) -> None:
        self._problems, self._done = problems, finished
        self.progress.update(self._task, description="sample", total=problems, completed=finished)
        if finished:
            self.line(f"{finished} of {problems} problems were finished before")

    def problem(self, result: ProblemResult | None, stats: Stats, seconds: float) -> None:
        self._done += 1
        if result is None:
            self._failed += 1
        else:
            self._graded += result.graded
            self._correct += result.correct
        numbers = f"{self._correct / self._graded:.1%} correct  " if self._graded else ""
        numbers += f"{stats.decoded_tokens:,} tokens decoded  {stats.decoded_tokens / seconds:.0f} tokens/s"
        if self._failed:
            numbers += f"  {self._failed} failed"
        self.progress.update(self._task, completed=self._done, numbers=numbers)
        self.line_every_tenth(
            self._done, self._problems, f"{self._done}/{self._problems} problems  {numbers}"
        )


def show_evaluation(console: Console, results: Mapping[str, Any], folder: Path) -> None:
    """The end of an evaluation: how was sampled, scores with their intervals, cost, files."""
    line = sampling_line(results["settings"]["sampling"], "problem")
    console.print(line, highlight=False, soft_wrap=True)
    console.print(_scores(results))
    console.print(_verdicts(results))
    if (line := unanswered(results)) is not None:
        console.print(Text(line, "yellow"), soft_wrap=True)
    console.print(_cost(results))
    files = (
        (REPORT, "the report: open it in a browser, no network needed"),
        (RESULTS, "every number, with all settings"),
        (SAMPLES, "every response: verdict, extracted answer, text"),
        (TREES, "every problem's tree, with log-probs and verdicts"),
        (PLOT, "accuracy against compute"),
        (CONFIG, "the effective configuration"),
        (LOG, "the log"),
    )
    show_written(console, folder, files)


def _scores(results: Mapping[str, Any]) -> Table:
    metrics = score_columns(results)
    table = _table("Scores in percent, below them the 95% interval over problems")
    for head in ("problems", *metrics.values(), "tokens", "truncated"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in _rows(table, results):
        tokens = row["response_tokens"]
        table.add_row(
            row["name"],
            f"{row['finished']}/{row['problems']}",
            *(_two_lines(row["metrics"].get(name)) for name in metrics),
            "–" if tokens["mean"] is None else f"{tokens['mean']:.0f}",
            "–" if tokens["truncated"] is None else f"{tokens['truncated']:.0%}",
        )
    return table


def _verdicts(results: Mapping[str, Any]) -> Table:
    table = _table("Verdicts in percent of the responses")
    for head in ("responses", *(verdict.replace("_", " ") for verdict in Verdict)):
        table.add_column(head, justify="right", no_wrap=True)
    for row in _rows(table, results):
        responses = row["responses"]
        shares = (row["verdicts"][verdict] / responses if responses else 0.0 for verdict in Verdict)
        table.add_row(row["name"], f"{responses:,}", *(f"{100 * share:.1f}" for share in shares))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    return table


def _rows(table: Table, results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows of a table; a line divides the benchmarks from all together."""
    for index, row in enumerate(score_rows(results)):
        if index and index == len(results["benchmarks"]):
            table.add_section()
        yield row


def _two_lines(estimate: Mapping[str, float | None] | None) -> Text | str:
    text = percent_and_interval(estimate)
    return "–" if text is None else Text.assemble((text[0], "bold"), "\n", (text[1], "dim"))


def _cost(results: Mapping[str, Any]) -> Table:
    cost, tokens = results["cost"], results["overall"]["tokens"]
    table = value_table("What it took")
    table.add_row("tokens decoded", f"{cost['decoded_tokens']:,}")
    if tokens["total"] > tokens["unique"]:
        ratio = tokens["total"] / tokens["unique"]
        table.add_row("the same responses one by one", f"{tokens['total']:,}  ({ratio:.2f}x)")
    table.add_row("tokens prefilled", f"{cost['prefilled_tokens']:,}")
    table.add_row("tokens/s", f"{cost['tokens_per_second']:,.0f}")
    table.add_row("responses/s", f"{cost['trajectories_per_second']:.1f}")
    table.add_row("seconds of sampling", f"{cost['seconds']:.1f}")
    table.add_row("device-seconds", f"{cost['device_seconds']:.1f}")
    if cost["failed_requests"]:
        table.add_row("failed requests", f"{cost['failed_requests']} of {cost['requests']}")
    failures = results["failures"]
    for name, reason in list(failures.items())[:_FAILURES]:
        table.add_row(Text(f"failed: {name}", "red"), reason)
    if len(failures) > _FAILURES:
        table.add_row(Text("failed", "red"), f"and {len(failures) - _FAILURES} more, in {RESULTS}")
    return table
