"""Compares two evaluations: differences on the problems that both have, with intervals over problems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treepo.errors import DataError, shown
from treepo.evaluation.metrics import Estimate, estimate
from treepo.evaluation.results import OVERALL
from treepo.rewards.extraction import BOXED

METRICS = ("mean", "weighted_mean", "majority")
_CONDITIONS = {
    ("reward", "answer"): BOXED,
    ("reward", "function"): None,
    ("reward", "url"): None,
    ("data", "system_prompt"): None,
    ("data", "chat_template"): True,
    ("sampling", "width"): None,
    ("sampling", "max_response_tokens"): None,
}
"""By section and key, what decides a score besides the model and how it samples, and the value of a key that
is not there.
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of one benchmark over the common problems. first, second: its means. difference: second -
    first.
    """

    benchmark: str
    metric: str
    first: float
    second: float
    difference: Estimate


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Compare two results documents by benchmark, and over all benchmarks if there are several.

    A metric is compared if both evaluations have it. Raises DataError if they have no problem in common, or
    if a problem's gold answers differ.
    """
    pairs = _common_problems(first, second)
    groups = [(name, [benchmark]) for name, benchmark in pairs.items()]
    if len(pairs) > 1:
        groups.append((OVERALL, list(pairs.values())))
    seed = first["settings"]["seed"]
    rows: list[Difference] = []
    for name, benchmarks in groups:
        for metric in METRICS:
            values = [_values(benchmark, metric) for benchmark in benchmarks]
            if any(map(len, values)):
                before, after = np.concatenate(values).mean(axis=0)
                differences = [pair[:, 1] - pair[:, 0] for pair in values]
                rows.append(
                    Difference(name, metric, float(before), float(after), estimate(differences, seed))
                )
    return rows


def different_conditions(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """One line that names the settings for which the scores of A and B do not measure the same; None if all
    are equal.
    """
    differences = []
    for (section, name), default in _CONDITIONS.items():
        before, after = (
            results["settings"].get(section, {}).get(name, default) for results in (first, second)
        )
        if before != after:
            differences.append(f"{section}.{name} is {shown(before)} in A and {shown(after)} in B")
    return f"A and B were not evaluated alike: {'; '.join(differences)}" if differences else None


Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def _common_problems(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Pair]]:
    """Both rows of each common problem, by benchmark."""
    others = {row["id"]: row for row in second["problems"]}
    pairs: dict[str, list[Pair]] = {}
    for row in first["problems"]:
        other = others.get(row["id"])
        if other is None:
            continue
        if other["answer"] != row["answer"]:
            raise DataError(
                f"problem {row['id']} has the gold answer {row['answer']!r} in one evaluation and "
                f"{other['answer']!r} in the other: they come from different files"
            )
        pairs.setdefault(row["benchmark"], []).append((row, other))
    if not pairs:
        names = [", ".join(part["name"] for part in results["benchmarks"]) for results in (first, second)]
        raise DataError(f"no problem in common: one has {names[0]}, the other {names[1]}")
    return pairs


def _values(pairs: Sequence[Pair], metric: str) -> np.ndarray:
    """float64 [P, 2]: both values of a metric for each problem that has both."""
    values = [
        (first["metrics"][metric], second["metrics"][metric])
        for first, second in pairs
        if first["metrics"].get(metric) is not None and second["metrics"].get(metric) is not None
    ]
    return np.array(values, dtype=np.float64).reshape(-1, 2)
