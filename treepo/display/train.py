"""Terminal output of `treepo train` and `treepo toy`: a line for each step, a live status, tables."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from treepo.data.output_folder import CONFIG, HELDOUT_TREES, LOG, SUMMARY, TREES
from treepo.display.heldout import accuracies
from treepo.display.live import LiveDisplay, duration, is_live, live_progress, show_written, value_table
from treepo.toy.make import ToyReport
from treepo.training.checkpoints import CHECKPOINTS
from treepo.training.metrics import STEP_PHASES
from treepo.training.pace import PaceMeter
from treepo.training.resume import Resume
from treepo.training.run_folder import BEST, CHECKPOINT, METRICS, TENSORBOARD

_PACE_SECONDS = 600.0  # between two lines about the time left, if there is no live status

type _Column = tuple[str, Callable[[Mapping[str, float]], str]]


def _seconds(metric: str) -> Callable[[Mapping[str, float]], str]:
    return lambda step: f"{step[metric]:.1f} s"


_LEARNING: tuple[_Column, ...] = (
    ("reward", lambda step: f"{step['reward']:+.3f}"),
    ("accuracy", lambda step: f"{step['accuracy']:.3f}"),
    ("tokens/s", lambda step: f"{step['rollout/tokens_per_second']:.0f}"),
    ("shared", lambda step: f"{step['total_over_unique']:.2f}x"),
)
_IN_TURN: tuple[_Column, ...] = (
    ("log-prob diff", lambda step: f"{step['logprob_difference_max']:.1e}"),
    *((phase, _seconds(metric)) for phase, metric in STEP_PHASES.items()),
)
_OVERLAPPING: tuple[_Column, ...] = (
    ("stale", lambda step: f"{step['staleness/mean']:.1f}"),
    ("stalest", lambda step: f"{step['staleness/max']:.0f}"),
    ("in flight", lambda step: f"{step['trees/growing'] + step['trees/ready']:.0f}"),
    ("engines idle", lambda step: f"{step['idle/engines']:.0%}"),
    ("trainer idle", lambda step: f"{step['idle/trainer']:.0%}"),
    ("step", _seconds("seconds/step")),
    ("weight sync", _seconds("seconds/weight_sync")),
)


@contextmanager
def toy_progress(console: Console) -> Iterator[Callable[[int, int, float], None]]:
    """Show the progress of `make_toy`: a bar in a terminal, a line every 50 steps elsewhere."""
    bar = live_progress(
        console,
        TextColumn("supervised warm start"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}", markup=False),
    )
    task = bar.add_task("", total=None, loss=float("nan"))

    def update(step: int, steps: int, loss: float) -> None:
        bar.update(task, completed=step, total=steps, loss=loss)
        if not is_live(console) and (step % 50 == 0 or step == steps):
            console.print(f"supervised warm start: step {step}/{steps}, loss {loss:.3f}", highlight=False)

    with bar:
        yield update


def show_toy(console: Console, report: ToyReport) -> None:
    """Show the toy: model, problems, accuracy."""
    table = Table(title="The toy", title_justify="left", show_header=False, pad_edge=False)
    table.add_row("model", f"{report.model}/  ({report.parameters / 1e6:.1f}M parameters, {report.family})")
    table.add_row("problems", f"{report.train}, {report.heldout}")
    table.add_row("held-out accuracy, sampled", f"{report.sampled_accuracy:.3f}")
    table.add_row(
        "made",
        "before; `treepo toy --force` makes it again" if report.cached else f"in {report.seconds:.0f} s",
    )
    console.print(table)


class TrainDisplay(LiveDisplay):
    """The `Reporter` of treepo.training.run_state; a context manager around the run.

    overlaps: whether trees of several steps are in flight at once.
    """

    def __init__(self, console: Console, title: str, steps: int, *, overlaps: bool = False) -> None:
        super().__init__(
            console,
            title,
            SpinnerColumn(),
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("steps{task.fields[left]}", markup=False),
        )
        self._steps, self._pace = steps, PaceMeter(steps)
        self._columns = (*_LEARNING, *(_OVERLAPPING if overlaps else _IN_TURN))
        self._task = self.progress.add_task("starting", total=steps, left="")
        self._header_shown = False
        self._started = self._paced = time.perf_counter()

    def phase(self, name: str, announce: bool = False) -> None:
        """`announce` marks a long phase that comes once: it gets a line if nothing is live."""
        self.progress.update(self._task, description=name)
        if announce and not self.live:
            self.line(f"{time.perf_counter() - self._started:6.0f} s  {name}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._header_shown:
            self._row("step", *(name for name, _ in self._columns), style="bold")
            self._header_shown = True
        self._row(f"{step}/{self._steps}", *(show(metrics) for _, show in self._columns))
        pace = self._pace.step(step, metrics)
        left = f", about {duration(pace.left_seconds)} left" if step < self._steps else ""
        self.progress.update(self._task, completed=step, left=left)
        if left and not self.live and time.perf_counter() - self._paced >= _PACE_SECONDS:
            self._paced = time.perf_counter()
            self.line(f"{pace.step_seconds:.1f} s a step{left}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        when = f"after step {step}" if step else "before training"
        best = ", the best so far" if metrics.get("heldout/best_step") == step else ""
        self.line(f"held-out accuracy {when}: {', '.join(accuracies(metrics))}{best}")

    def _row(self, step: str, *values: str, style: str | None = None) -> None:
        widths = (max(8, len(name) + 1) for name, _ in self._columns)
        cells = (f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        self.line(f"{step:>7}" + "".join(cells), style=style)


def show_resume(console: Console, resume: Resume | None, out: Path) -> None:
    """Show which checkpoint the run continues from, and which keys changed."""
    if resume is None:
        console.print(f"{out} has no checkpoint: the run begins", highlight=False, soft_wrap=True)
        return
    console.print(
        f"{resume.checkpoint}: the run continues after step {resume.state.steps_done}",
        highlight=False,
        soft_wrap=True,
    )
    for change in resume.changes:
        console.print(f"  {change}", highlight=False, soft_wrap=True)


def show_summary(console: Console, summary: Mapping[str, Any], folder: Path) -> None:
    """Show the result of a run: accuracy, cost, files."""
    table = value_table("What the run came to")
    table.add_row("data type of the model", summary["dtype"])
    for when, style in (("before", ""), ("after", "bold")):
        if (accuracy := summary[f"accuracy_{when}"]) is not None:
            table.add_row(f"held-out accuracy {when}", Text(f"{accuracy:.3f}", style))
    if summary["best"] is not None:
        table.add_row(f"the best, after step {summary['best']['step']}", f"{summary['best']['accuracy']:.3f}")
    decoded, sequential = summary["decoded_tokens"], summary["sequential_tokens"]
    table.add_row("tokens decoded in training", f"{decoded:,}")
    table.add_row("the same leaves one by one", f"{sequential:,}  ({sequential / decoded:.2f}x)")
    if summary["log_prob_check"] is not None:
        mean, largest = summary["log_prob_check"]["mean"], summary["log_prob_check"]["max"]
        table.add_row("log-prob difference before step 1", f"{mean:.1e}, at most {largest:.1e}")
    table.add_row("largest log-prob difference", f"{summary['max_logprob_difference']:.1e}")
    table.add_section()
    for phase, seconds in summary["phase_seconds"].items():
        table.add_row(phase, f"{seconds:.1f} s")
    table.add_row("all", f"{summary['seconds']:.1f} s", style="bold")
    console.print(table)
    best = ((f"{BEST}/", "the model of the best step, likewise"),) if summary["best"] is not None else ()
    evaluations = ((HELDOUT_TREES, "the same of every evaluation"),)
    files = (
        (f"{CHECKPOINT}/", "the trained model, a Hugging Face folder"),
        *best,
        (f"{CHECKPOINTS}/", "what `treepo train --resume` continues from"),
        (TREES, "every tree: segments, log-probs, versions, rewards"),
        *(evaluations if (folder / HELDOUT_TREES).exists() else ()),
        (METRICS, "every step's numbers"),
        (f"{TENSORBOARD}/", f"the same: tensorboard --logdir {folder / TENSORBOARD}"),
        (SUMMARY, "this summary"),
        (CONFIG, "the effective configuration"),
        (LOG, "the log"),
    )
    # `logging` may leave some out.
    show_written(console, folder, [(name, about) for name, about in files if (folder / name).exists()])
