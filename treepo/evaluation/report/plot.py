"""Plots accuracy against compute as SVG: a curve for each metric and evaluation, over decoded tokens a
problem. Accuracy goes from 0 to 1 in every plot.

k of n independent samples cost k/n of the evaluation's tokens. A tree is one point for each metric: k of its
leaves cost more than k/n of its tokens, because they need prefixes that they share with others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 660, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 46
_LEGEND_LINE = 18
_COLOURS = ("#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#475569")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#64748b}.grid{stroke:#94a3b8;stroke-opacity:.3}"
    ".line{fill:none;stroke-width:2}.hollow{fill:#fff;stroke-width:2}.interval{stroke-width:1.5;stroke-opacity:.45}"
)
"""The style sheet in every plot."""
_DASHES = {"maj": "", "pass": "6 4", "mean": "2 3"}
_NAMES = {"maj": "maj@k", "pass": "pass@k", "mean": "mean@n"}


@dataclass(frozen=True, slots=True)
class Point:
    """tokens: decoded for one problem. low, high: the interval of `value`."""

    tokens: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """An evaluation's points for each metric ("maj", "pass", "mean"), in order of tokens."""

    label: str
    points: Mapping[str, Sequence[Point]]


def curve(results: Mapping[str, Any], name: str) -> Curve:
    """The curves of a results document. name: of the evaluation, in the legend."""
    overall, sampling = results["overall"], results["settings"]["sampling"]
    samples, tree = sampling["width"], sampling["mode"] == "tree"
    tokens = overall["tokens"]["unique"] / max(overall["finished"], 1)
    points: dict[str, list[Point]] = {"maj": [], "pass": [], "mean": []}
    for metric, estimate in overall["metrics"].items():
        kind, _, number = metric.partition("@")
        k = int(number or samples)
        of_leaves = tree and k != samples
        if kind not in points or estimate["value"] is None or of_leaves or (kind == "mean" and not tree):
            continue  # the mean of independent samples equals their pass@1
        at = Point(tokens * k / samples, estimate["value"], estimate["low"], estimate["high"])
        points[kind].append(at)
    shape = (
        f"tree, width {samples}, branching {sampling['branching']}" if tree else f"sequential, n = {samples}"
    )
    return Curve(f"{name} ({shape})", points)


def accuracy_plot(curves: Sequence[Curve]) -> str:
    """An SVG document without external references; it scales to the width it is given."""
    points = [point for curve in curves for series in curve.points.values() for point in series]
    if not points:
        return _document(["<text x='20' y='30'>nothing to plot</text>"], _HEIGHT, len(curves))
    scale = _Scale.of(points)
    height = _HEIGHT + _LEGEND_LINE * (len(curves) + 1)
    parts = [*_grid(scale), *_legend(curves)]
    for index, drawn in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        for kind, series in drawn.points.items():
            parts += _series(kind, series, colour, scale)
    return _document(parts, height, len(curves))


@dataclass(frozen=True, slots=True)
class _Scale:
    """The limits of the axis of tokens, as log2."""

    left: float
    right: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> "_Scale":
        exponents = [math.log2(max(point.tokens, 1.0)) for point in points]
        left, right = math.floor(min(exponents)), math.ceil(max(exponents))
        return cls(left, max(right, left + 1))

    def x(self, tokens: float) -> float:
        share = (math.log2(max(tokens, 1.0)) - self.left) / (self.right - self.left)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value * (_HEIGHT - _TOP - _BOTTOM)


def _grid(scale: _Scale) -> list[str]:
    parts = []
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        y = scale.y(value)
        parts.append(f"<path class='grid' d='M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{value:.1f}</text>")
    every = max(math.ceil((scale.right - scale.left) / 8), 1)
    for exponent in range(int(scale.left), int(scale.right) + 1, every):
        x = scale.x(2.0**exponent)
        parts.append(f"<path class='grid' d='M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}'/>")
        parts.append(
            f"<text x='{x:.1f}' y='{_HEIGHT - _BOTTOM + 18}' text-anchor='middle'>{_tokens(exponent)}</text>"
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f"<text x='{middle}' y='{_HEIGHT - 8}' text-anchor='middle'>tokens decoded for one problem</text>"
    )
    return parts


def _tokens(exponent: int) -> str:
    tokens = 2**exponent
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size:
            return f"{tokens // size}{unit}"
    return str(tokens)


def _legend(curves: Sequence[Curve]) -> list[str]:
    used = [kind for kind in _DASHES if any(curve.points[kind] for curve in curves)]
    parts = []
    for index, kind in enumerate(used):
        x, y = _LEFT + index * 110, _HEIGHT + 8
        parts.append(
            f"<path class='line' d='M{x} {y}h28' stroke='#64748b' stroke-dasharray='{_DASHES[kind]}'/>"
        )
        parts.append(_mark(kind, x + 14, y, "#64748b"))
        parts.append(f"<text x='{x + 34}' y='{y + 4}'>{_NAMES[kind]}</text>")
    for index, one in enumerate(curves):
        y = _HEIGHT + 8 + _LEGEND_LINE * (index + 1)
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f"<rect x='{_LEFT}' y='{y - 5}' width='10' height='10' fill='{colour}'/>")
        parts.append(f"<text x='{_LEFT + 18}' y='{y + 4}'>{escape(one.label)}</text>")
    return parts


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "maj":
        return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'/>"
    if kind == "pass":
        return f"<circle class='hollow' cx='{x:.1f}' cy='{y:.1f}' r='3.5' stroke='{colour}'/>"
    return f"<path d='M{x - 4.5:.1f} {y:.1f}l4.5 -4.5l4.5 4.5l-4.5 4.5z' fill='{colour}'/>"


def _series(kind: str, series: Sequence[Point], colour: str, scale: _Scale) -> list[str]:
    places = [(scale.x(point.tokens), scale.y(point.value)) for point in series]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = (
        [f"<path class='line' d='M{line}' stroke='{colour}' stroke-dasharray='{_DASHES[kind]}'/>"]
        if series
        else []
    )
    for point, (x, y) in zip(series, places, strict=True):
        low, high = scale.y(point.low), scale.y(point.high)
        parts.append(f"<path class='interval' d='M{x:.1f} {low:.1f}V{high:.1f}' stroke='{colour}'/>")
        parts.append(_mark(kind, x, y, colour))
    return parts


def _document(parts: Sequence[str], height: int, curves: int) -> str:
    label = f"accuracy against decoded tokens of {curves} evaluation{'s' if curves > 1 else ''}"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' role='img' "
        f"aria-label='{label}'><style>{STYLE}</style>" + "".join(parts) + "</svg>\n"
    )
