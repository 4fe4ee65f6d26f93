"""Draw the documentation's figures: `python docs/figures/make.py [RUN [SMOLLM2_RUN [ROUTING]]]`.

Without RUN only `tree.svg` and `asynchrony.svg` are written. RUN is the folder of a finished quickstart:
`terminal.svg` shows what that run printed, and `learning.svg` its accuracy step by step. SMOLLM2_RUN is that
of a finished `examples/smollm2/train.yaml`, for `smollm2.svg`. All three are drawn from the runs' own files.
ROUTING is a file of what `python -m benchmarks.routing_replay` printed, for `routing.svg`. An empty argument
leaves its figures as they are.

`arms.svg` is drawn from benchmarks/results/learning.jsonl, if it is there (`python -m benchmarks.learning`).

Every figure has its own background and loads nothing from a server, so it reads in light and dark themes, on
GitHub and on the site.
"""

import io
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.sax.saxutils import escape

from rich.console import Console
from rich.terminal_theme import MONOKAI
from scipy.stats import t as student

from treepo.display.train import TrainDisplay, show_summary

FIGURES = Path(__file__).parent
DIFFERENCE = "logprob_difference_mean"
EXAMPLE = "examples/quickstart.yaml"
ARM_RESULTS = Path("benchmarks/results/learning.jsonl")
TITLES = ("Accuracy on the quickstart’s sums", "Accuracy of SmolLM2-135M-Instruct on sums")
STYLE = """<style>
text { font: 13px system-ui, "Segoe UI", "DejaVu Sans", Verdana, sans-serif; fill: #1f2933 }
.card { fill: #ffffff; stroke: #d5dbe1 }
.big { font-size: 17px; font-weight: 600 }
.bold { font-weight: 600 }
.small { font-size: 12px }
.soft { fill: #5b6875 }
.inside { font-size: 12px; font-weight: 600; fill: #ffffff }
.alone { fill: #0b4f49 }
.edge, .axis, .pointer { fill: none; stroke: #8a97a4; stroke-width: 1.5 }
.pointer { stroke-width: 1.25; stroke-dasharray: 3 3 }
.grid { stroke: #e4e8ec }
.prompt { fill: #5b6875 }
.shared3 { fill: #0b655e }
.shared2 { fill: #179085 }
.shared1 { fill: #cfebe7 }
.right { stroke: #15803d }
.wrong { stroke: #c2410c }
.mark { fill: none; stroke-width: 2.5; stroke-linecap: round; stroke-linejoin: round }
.curve { fill: none; stroke: #0f766e; stroke-width: 2.5 }
.point { fill: #0f766e }
.sync { fill: #c2410c }
.heldout { fill: none; stroke: #c2410c; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6eaee }
  .inside { fill: #ffffff }
  .card { fill: #12181f; stroke: #303a45 }
  .soft { fill: #9aa7b4 }
  .grid { stroke: #26303a }
  .shared1 { fill: #1c4744 }
  .alone { fill: #bfe5e0 }
  .prompt { fill: #4d5a67 }
  .right { stroke: #4ade80 }
  .wrong, .heldout { stroke: #fb923c }
  .curve { stroke: #2dd4bf }
  .point { fill: #2dd4bf }
}
</style>"""


def svg(width: int, height: int, label: str, body: list[str]) -> str:
    """A figure on a card of its own colour."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(label)}">',
        STYLE,
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        *body,
        "</svg>\n",
    ])  # fmt: skip


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


# The tree


@dataclass(frozen=True, slots=True)
class Node:
    """A segment of the tree that is drawn. right: whether the answer that ends here is correct."""

    children: tuple["Node", ...] = ()
    right: bool | None = None

    def leaves(self) -> int:
        return sum(child.leaves() for child in self.children) or 1

    def segments(self) -> int:
        return 1 + sum(child.segments() for child in self.children)

    def depths(self, above: int = 1) -> list[int]:
        """Segments on the path of every leaf."""
        below = [depth for child in self.children for depth in child.depths(above + 1)]
        return below or [above]


RIGHT, WRONG = Node(right=True), Node(right=False)
TREE = (
    Node((Node((RIGHT, WRONG)), Node((RIGHT,)))),
    Node((WRONG, Node((RIGHT, WRONG)))),
)
BAR, GAP, ROW, TOP, LEFT = 116, 40, 38, 96, 34
PROMPT_WIDTH, BAR_HEIGHT = 84, 24


def bar(x: float, y: float, style: str, words: str, width: int = BAR) -> str:
    """A segment, centred at height `y`."""
    inside = "inside alone" if style == "shared1" else "inside"
    return (
        f'<rect class="{style}" x="{x:g}" y="{y - BAR_HEIGHT / 2:g}" width="{width}" height="{BAR_HEIGHT}" '
        f'rx="5"/>' + text(x + width / 2, y + 4, words, inside, "middle")
    )


def edge(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (x + to_x) / 2
    return f'<path class="edge" d="M{x:g} {y:g} C{middle:g} {y:g} {middle:g} {to_y:g} {to_x:g} {to_y:g}"/>'


def mark(x: float, y: float, right: bool) -> str:
    """A tick or a cross, drawn: fonts differ in theirs."""
    path = f"M{x} {y} l4 5 l8 -10" if right else f"M{x} {y - 5} l10 10 m0 -10 l-10 10"
    return f'<path class="mark {"right" if right else "wrong"}" d="{path}"/>'


def place(node: Node, x: float, rows: Iterator[int], parts: list[str]) -> float:
    """Draw a segment and all below it; returns its height on the page."""
    drawn: list[str] = []
    if node.children:
        below = [place(child, x + BAR + GAP, rows, drawn) for child in node.children]
        y = sum(below) / len(below)
        parts += [edge(x + BAR, y, x + BAR + GAP, to) for to in below]
    else:
        y = TOP + ROW * next(rows)
        assert node.right is not None
        parts.append(mark(x + BAR + 12, y, node.right))
        parts.append(text(x + BAR + 32, y + 4, "+1" if node.right else "−1", "small soft"))
    sharing = node.leaves()
    words = "1 answer" if sharing == 1 else f"in {sharing} answers"
    parts.append(bar(x, y, f"shared{sharing}", words))
    parts += drawn
    return y


def tree_figure() -> str:
    parts: list[str] = []
    rows = iter(range(100))
    first = LEFT + PROMPT_WIDTH + GAP
    heights = [place(root, first, rows, parts) for root in TREE]
    prompt = sum(heights) / 2
    parts += [edge(LEFT + PROMPT_WIDTH, prompt, first, y) for y in heights]
    parts.append(bar(LEFT, prompt, "prompt", "prompt", PROMPT_WIDTH))

    leaves = sum(root.leaves() for root in TREE)
    shared = sum(root.segments() for root in TREE)
    alone = sum(depth for root in TREE for depth in root.depths())
    middle = first + BAR / 2
    bottom = TOP + ROW * leaves + 14
    parts += [
        f'<path class="pointer" d="M{middle:g} 66 V{heights[0] - BAR_HEIGHT / 2 - 4:g}"/>',
        text(LEFT, 34, "Decoded once", "big"),
        text(LEFT, 56, "Every continuation finds the text above it in SGLang’s radix cache.", "soft"),
        f'<path class="pointer" d="M{middle:g} {heights[1] + BAR_HEIGHT / 2 + 4:g} V{bottom - 18:g}"/>',
        text(LEFT, bottom + 4, "Trained once", "big"),
        text(
            LEFT,
            bottom + 26,
            "A shared token carries the advantages of all answers below it; the gradient is the same.",
            "soft",
        ),
    ]

    x, unit = 690, 12
    parts.append(text(x, 34, f"The same {leaves} answers", "big"))
    for y, name, count, style in (
        (96, "sampled one by one", alone, "prompt"),
        (164, "sampled as a tree", shared, "shared3"),
    ):
        parts.append(text(x, y, f"{name}: {count} segments"))
        width = unit * count
        parts.append(f'<rect class="{style}" x="{x}" y="{y + 10}" width="{width}" height="20" rx="4"/>')
    label = "A tree of answers: the text that they share is decoded once and trained once"
    return svg(940, bottom + 48, label, parts)


# Who works when


@dataclass(frozen=True, slots=True)
class Work:
    """A stretch of one side's time. batch: the step whose trees are sampled or trained."""

    batch: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What engines and trainer do under one setting. syncs: when each weight sync ends."""

    name: str
    note: str
    engines: Sequence[Work]
    trainer: Sequence[Work]
    syncs: Sequence[float]


TIMELINES = (
    Timeline(
        "loop.mode: sync",
        "A step lasts as long as its slowest tree, and the trainer’s time.",
        [Work(1, 0, 5), Work(2, 8, 13), Work(3, 16, 21)],
        [Work(1, 5, 7.5), Work(2, 13, 15.5), Work(3, 21, 23.5)],
        [8, 16, 24],
    ),
    Timeline(
        "sampling.oversample: 1.5",
        "The slowest trees pause, keep their segments, and go on in the next step.",
        [Work(1, 0, 3.2), Work(2, 6.2, 9.4), Work(3, 12.4, 15.6), Work(4, 18.6, 21.8)],
        [Work(1, 3.2, 5.7), Work(2, 9.4, 11.9), Work(3, 15.6, 18.1), Work(4, 21.8, 23.5)],
        [6.2, 12.4, 18.6],
    ),
    Timeline(
        "loop.mode: async",
        "Trees of later steps grow while the trainer learns. A weight sync interrupts them, and they go on.",
        [
            *(Work(1, 0, 4.5), Work(2, 4.5, 8.4), Work(3, 8.4, 12.3)),
            *(Work(4, 12.3, 16.2), Work(5, 16.2, 20.1), Work(6, 20.1, 24)),
        ],
        [Work(1, 4.5, 7), Work(2, 8.4, 10.9), Work(3, 12.3, 14.8), Work(4, 16.2, 18.7), Work(5, 20.1, 22.6)],
        [7.5, 11.4, 15.3, 19.2, 23.1],
    ),
)
_LANE, _UNIT, _SYNC = 26, 31, 0.5


def lane(works: Sequence[Work], syncs: Sequence[float], x: float, y: float, style: str) -> list[str]:
    """One side's work, a bar for each batch; weight syncs cut through both sides."""
    parts = [f'<path class="grid" d="M{x:g} {y:g} h{24 * _UNIT}"/>']
    for work in works:
        left, width = x + work.start * _UNIT, (work.end - work.start) * _UNIT - 2
        parts.append(
            f'<rect class="{style}" x="{left:g}" y="{y - _LANE / 2:g}" width="{width:g}" height="{_LANE}" '
            'rx="4"/>' + text(left + width / 2, y + 4, f"step {work.batch}", "inside", "middle")
        )
    for end in syncs:
        left = x + (end - _SYNC) * _UNIT
        parts.append(
            f'<rect class="sync" x="{left:g}" y="{y - _LANE / 2:g}" width="{_SYNC * _UNIT - 2:g}" '
            f'height="{_LANE}"/>'
        )
    return parts


def asynchrony_figure() -> str:
    parts, x = [], 120
    for number, timeline in enumerate(TIMELINES):
        y = 40 + 138 * number
        parts += [text(24, y, timeline.name, "big"), text(24, y + 20, timeline.note, "soft")]
        for row, name, works, style in (
            (48, "engines", timeline.engines, "shared2"),
            (80, "trainer", timeline.trainer, "shared3"),
        ):
            parts.append(text(24, y + row + 4, name))
            parts += lane(works, timeline.syncs, x, y + row, style)
    bottom = 40 + 138 * len(TIMELINES)
    parts += [
        f'<rect class="sync" x="24" y="{bottom - 12}" width="13" height="16"/>',
        text(46, bottom, "weight sync. Times are made up.", "small soft"),
    ]
    return svg(890, bottom + 22, "Engines and trainer in turn, with oversampling, and side by side", parts)


# A run


def terminal(run: Path) -> str:
    """What `treepo train` printed of the run, by the code that prints it."""
    console = Console(record=True, width=92, file=io.StringIO())
    steps, summary = read_run(run)
    display = TrainDisplay(console, f"{EXAMPLE} -> {run}", summary["steps"])
    with display:
        for metrics in steps:
            display.step(int(metrics["step"]), metrics)
    show_summary(console, summary, run)
    drawn = console.export_svg(title=f"treepo train {EXAMPLE}", theme=MONOKAI, unique_id="terminal")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # they would be fetched from a server


def learning_curve(run: Path, title: str) -> str:
    """Accuracy of each step's answers, and on held-out problems before and after."""
    steps, summary = read_run(run)
    left, right, top, bottom = 62, 676, 62, 250
    last = summary["steps"]

    def at(step: float, accuracy: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * accuracy

    points = [at(metrics["step"] - 1, metrics["accuracy"]) for metrics in steps]
    parts = [text(left, 34, title, "big")]
    for tenths in range(0, 11, 2):
        _, y = at(0, tenths / 10)
        parts.append(f'<path class="grid" d="M{left} {y:g} H{right}"/>')
        parts.append(text(left - 10, y + 4, f"{tenths / 10:.1f}", "small soft", "end"))
    parts += [
        text(at(step, 0)[0], bottom + 20, str(step), "small soft", "middle") for step in range(0, last + 1, 2)
    ]
    parts.append(text((left + right) / 2, bottom + 42, "optimizer steps taken", "soft", "middle"))
    parts.append(f'<path class="curve" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
    parts += [f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
    for step, key in ((0, "accuracy_before"), (last, "accuracy_after")):
        x, y = at(step, summary[key])
        parts.append(f'<circle class="heldout" cx="{x:.1f}" cy="{y:.1f}" r="7"/>')
        parts.append(text(x + 14, y + 18 if step == 0 else y + 4, f"{summary[key]:.2f}", "bold"))
    parts += [
        '<circle class="point" cx="470" cy="196" r="4"/>',
        text(482, 200, "answers sampled in training", "small"),
        '<circle class="heldout" cx="470" cy="222" r="7"/>',
        text(482, 226, "held-out problems", "small"),
    ]
    accuracies = f"{summary['accuracy_before']:.2f} to {summary['accuracy_after']:.2f}"
    return svg(740, 308, f"Held-out accuracy goes from {accuracies} in {last} steps", parts)


def routing_curves(file: Path) -> str:
    """Mean log-prob difference of each step, without and with routing replay."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "step" in line]
    left, right, top, bottom = 72, 676, 62, 250
    last = max(line["step"] for line in steps)
    unit = 10.0 ** math.floor(math.log10(max(line[DIFFERENCE] for line in steps)))
    highest = math.ceil(max(line[DIFFERENCE] for line in steps) / unit) * unit

    def at(step: float, difference: float) -> tuple[float, float]:
        x = left + (right - left) * (step - 1) / (last - 1)
        return x, bottom - (bottom - top) * difference / highest

    parts = [text(left, 34, "Log-probs of engine and trainer, a mixture in bfloat16", "big")]
    for fifths in range(6):
        _, y = at(1, highest * fifths / 5)
        parts.append(f'<path class="grid" d="M{left} {y:g} H{right}"/>')
        parts.append(text(left - 10, y + 4, f"{1000 * highest * fifths / 5:.2g}", "small soft", "end"))
    parts += [
        text(at(step, 0)[0], bottom + 20, str(step), "small soft", "middle") for step in range(1, last + 1)
    ]
    parts.append(text((left + right) / 2, bottom + 42, "step", "soft", "middle"))
    for row, (setting, style) in enumerate((("none", "heldout"), ("rollout", "curve"))):
        points = [at(line["step"], line[DIFFERENCE]) for line in steps if line["setting"] == setting]
        parts.append(f'<path class="{style}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
        y = 76 + 26 * row
        parts.append(f'<path class="{style}" d="M450 {y} h26"/>')
        parts.append(text(486, y + 4, f"trainer.routing_replay: {setting}", "small"))
    parts.append(text(left, 52, "mean difference, thousandths of a nat", "small soft"))
    return svg(740, 308, "The log-prob difference of every step without and with routing replay", parts)


def read_run(run: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The metrics of every step, and the summary."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "seconds/step" in line]  # the others are evaluations
    return steps, json.loads((run / "summary.json").read_text(encoding="utf-8"))


# The learning benchmark

PANELS = {"sums": "Long sums", "search": "Reaching a number"}
_BASELINE = "grpo"
_PANEL, _NAMES, _TOP, _ROW = 330, 130, 84, 24


def arms_figure(results: Path) -> str:
    """Each arm's held-out accuracy after the last step: the mean over seeds and its 95% interval, a panel for
    each task. A line marks the baseline's mean.
    """
    points = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    last = max(point["step"] for point in points)
    ends = [point for point in points if point["step"] == last]
    arms = list(dict.fromkeys(point["arm"] for point in points))
    bottom = _TOP + _ROW * len(arms)
    parts = [text(24, 34, "Held-out accuracy after equally many decoded tokens", "big")]
    parts += [text(_NAMES, _TOP + _ROW * row + 17, arm, "", "end") for row, arm in enumerate(arms)]
    for number, (task, title) in enumerate(PANELS.items()):
        left = _NAMES + 20 + number * _PANEL
        accuracies = {
            arm: [point["accuracy"] for point in ends if (point["task"], point["arm"]) == (task, arm)]
            for arm in arms
        }
        parts.append(text(left, _TOP - 12, title, "bold"))
        parts += arms_panel(
            {arm: interval(each) for arm, each in accuracies.items() if each}, arms, left, bottom
        )
    parts.append(text(_NAMES + 20, bottom + 46, "Means over seeds with 95% intervals.", "small soft"))
    width = _NAMES + 20 + _PANEL * len(PANELS)
    return svg(width, bottom + 64, "Held-out accuracy of each arm after equally many decoded tokens", parts)


def interval(values: list[float]) -> tuple[float, float]:
    """The mean of at least two values, and half the width of its 95% interval, Student's."""
    return mean(values), float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def arms_panel(
    measured: dict[str, tuple[float, float]], arms: list[str], left: float, bottom: float
) -> list[str]:
    """One task's rows. The axis goes over the intervals in tenths."""
    low = math.floor(10 * min(centre - half for centre, half in measured.values()))
    high = math.ceil(10 * max(centre + half for centre, half in measured.values()))
    right = left + _PANEL - 50

    def along(accuracy: float) -> float:
        return left + (right - left) * (10 * accuracy - low) / (high - low)

    parts: list[str] = []
    for tenths in range(low, high + 1):
        x = along(tenths / 10)
        parts.append(f'<path class="grid" d="M{x:g} {_TOP} V{bottom}"/>')
        parts.append(text(x, bottom + 20, f"{tenths / 10:.1f}", "small soft", "middle"))
    parts.append(f'<path class="pointer" d="M{along(measured[_BASELINE][0]):.1f} {_TOP} V{bottom}"/>')
    for row, arm in enumerate(arms):
        if arm in measured:
            centre, half = measured[arm]
            y = _TOP + _ROW * row + 12.5
            ends = f"M{along(centre - half):.1f} {y} H{along(centre + half):.1f}"
            parts.append(f'<path class="curve" d="{ends}"/>')
            parts.append(f'<circle class="point" cx="{along(centre):.1f}" cy="{y}" r="4.5"/>')
    return parts


def main(paths: list[str]) -> None:
    """Write the figures. paths: RUN, SMOLLM2_RUN and ROUTING of the module's docstring."""
    quickstart, smollm2, routing = map(Path, [*paths, "", "", ""][:3])
    figures = {"tree": tree_figure(), "asynchrony": asynchrony_figure()}
    if quickstart.name:
        figures |= {"learning": learning_curve(quickstart, TITLES[0]), "terminal": terminal(quickstart)}
    if smollm2.name:
        figures["smollm2"] = learning_curve(smollm2, TITLES[1])
    if routing.name:
        figures["routing"] = routing_curves(routing)
    if ARM_RESULTS.exists():
        figures["arms"] = arms_figure(ARM_RESULTS)
    for name, drawn in figures.items():
        (FIGURES / f"{name}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
