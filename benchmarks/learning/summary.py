"""What the evaluations of all runs say about each arm: means over seeds, with 95% intervals.

A curve is the mean over seeds at each evaluation, along the mean decoded tokens, and straight between
evaluations. The interval of an accuracy is Student's. That of a ratio is of 2,000 resamples of the seeds, an
arm's and the baseline's apart; with five seeds such an interval is somewhat too narrow.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.learning.arms import BASELINE
from benchmarks.learning.run import Point

_RESAMPLES = 2000
Runs = Mapping[int, Sequence[Point]]
"""The evaluations of an arm on a task in their order, by seed."""


def summary(points: Sequence[Point], reached: float | None = None) -> Iterator[dict[str, Any]]:
    """One line for each task and arm.

    accuracy: after the last step. tokens_a_step, trained_tokens_a_step, seconds_a_step, mixed: means over the
    run. tokens_to, seconds_to: decoded tokens and seconds until the mean curve reaches the accuracy `target`:
    `reached`, or the baseline's after its last step; null: it does not. tokens_over_baseline: those tokens
    over the baseline's of its whole run.
    """
    by_task: dict[str, dict[str, dict[int, list[Point]]]] = {}
    for point in points:
        by_task.setdefault(point.task, {}).setdefault(point.arm, {}).setdefault(point.seed, []).append(point)
    for task, arms in by_task.items():
        baseline = arms.get(BASELINE)
        for arm, runs in arms.items():
            yield {"task": task, "arm": arm, **_line(runs, baseline, reached)}


def _line(runs: Runs, baseline: Runs | None, reached: float | None) -> dict[str, Any]:
    ends = [run[-1] for run in runs.values()]
    steps = ends[0].step
    target = reached if baseline is None or reached is not None else _curve(baseline, "decoded_tokens")[1][-1]
    line: dict[str, Any] = {
        "seeds": len(runs),
        "accuracy": _mean_and_interval([end.accuracy for end in ends]),
        "tokens_a_step": round(float(np.mean([end.decoded_tokens for end in ends])) / steps),
        "trained_tokens_a_step": round(float(np.mean([end.trained_tokens for end in ends])) / steps),
        "seconds_a_step": round(float(np.mean([end.seconds for end in ends])) / steps, 2),
        "mixed": round(float(np.mean([end.mixed for end in ends if end.mixed is not None])), 3),
    }
    if target is not None:
        line["target"] = round(float(target), 4)
        for name, along in (("tokens_to", "decoded_tokens"), ("seconds_to", "seconds")):
            line[name] = _finite(crossing(*_curve(runs, along), target))
    if baseline is not None:
        line["tokens_over_baseline"] = _ratio_and_interval(runs, baseline, reached)
    return line


def crossing(along: np.ndarray, accuracy: np.ndarray, target: float) -> float:
    """Where a curve first reaches `target`, straight between its points; inf if it does not."""
    if accuracy[0] >= target:
        return float(along[0])
    above = np.flatnonzero(accuracy >= target)
    if not above.size:
        return float("inf")
    last = int(above[0])
    share = (target - accuracy[last - 1]) / (accuracy[last] - accuracy[last - 1])
    return float(along[last - 1] + share * (along[last] - along[last - 1]))


def _curve(runs: Runs, along: str, seeds: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `along` and of the accuracy at each evaluation."""
    chosen = [runs[seed] for seed in seeds or runs]
    means = np.mean([[(getattr(p, along), p.accuracy) for p in run] for run in chosen], axis=0)
    return means[:, 0], means[:, 1]


def _ratio(runs: Runs, baseline: Runs, reached: float | None, seeds: Sequence[Sequence[int] | None]) -> float:
    tokens, accuracy = _curve(baseline, "decoded_tokens", seeds[1])
    target = accuracy[-1] if reached is None else reached
    return crossing(*_curve(runs, "decoded_tokens", seeds[0]), target) / tokens[-1]


def _ratio_and_interval(runs: Runs, baseline: Runs, reached: float | None) -> dict[str, Any]:
    """The ratio and the ends of its interval; null: the accuracy is not reached, or there is one seed."""
    ratio = _finite(_ratio(runs, baseline, reached, (None, None)), 3)
    if min(len(runs), len(baseline)) == 1:
        return {"ratio": ratio, "low": None, "high": None}
    draws = np.random.default_rng(0)
    resampled: list[float] = []
    for _ in range(_RESAMPLES):
        seeds = [draws.choice(list(one), len(one)).tolist() for one in (runs, baseline)]
        resampled.append(_ratio(runs, baseline, reached, seeds))
    low, high = np.quantile(resampled, (0.025, 0.975), method="nearest")
    return {"ratio": ratio, "low": _finite(low, 3), "high": _finite(high, 3)}


def _mean_and_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean over seeds, and the ends of its interval; null for one seed."""
    mean, seeds = float(np.mean(values)), len(values)
    if seeds == 1:
        return {"mean": round(mean, 4), "low": None, "high": None}
    half = float(student.ppf(0.975, seeds - 1) * np.std(values, ddof=1) / seeds**0.5)
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def _finite(value: float, digits: int = 0) -> float | None:
    """`value`, rounded; None if it is not finite, which JSON cannot say."""
    return round(float(value), digits) if np.isfinite(value) else None
