"""Two evaluations of the same problems: paired differences with intervals over problems."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treepo.errors import DataError
from treepo.evaluation.metrics import Estimate, estimate
from treepo.evaluation.results import SCHEMA

METRICS = ("mean", "weighted_mean", "majority")
OVERALL = "all (by size)"


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of one benchmark, over the problems that both have. difference: second - first."""

    benchmark: str
    metric: str
    first: float
    second: float
    difference: Estimate


def read_results(path: Path) -> dict[str, Any]:
    """The results of a folder or of its results.json. Raises DataError."""
    file = path if path.is_file() else path / "results.json"
    try:
        results = json.loads(file.read_text())
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; a folder that `treepo eval` has written is needed"
        ) from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise DataError(f"{file}: no results of `treepo eval` with schema {SCHEMA}")
    return results


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Differences by benchmark, and over all where there are several.

    A metric is compared where both evaluations have it. Raises DataError where they have no problem in
    common, or one id stands for two problems.
    """
    pairs = _pairs(first, second)
    seed = first["settings"]["seed"]
    rows: list[Difference] = []
    for name, strata in _strata(pairs):
        for metric in METRICS:
            values = [_values(benchmark, metric) for benchmark in strata]
            if any(map(len, values)):
                before, after = np.concatenate(values).mean(axis=0)
                differences = [pair[:, 1] - pair[:, 0] for pair in values]
                rows.append(
                    Difference(name, metric, float(before), float(after), estimate(differences, seed))
                )
    return rows


Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Pair]]:
    """The two rows of each common problem, by benchmark."""
    others = {row["id"]: row for row in second["problems"]}
    pairs: dict[str, list[Pair]] = {}
    for row in first["problems"]:
        other = others.get(row["id"])
        if other is None:
            continue
        if other["answer"] != row["answer"]:
            raise DataError(
                f"problem {row['id']} has the gold answer {row['answer']!r} in one evaluation and "
                f"{other['answer']!r} in the other: they are of different files"
            )
        pairs.setdefault(row["benchmark"], []).append((row, other))
    if not pairs:
        names = [", ".join(part["name"] for part in results["benchmarks"]) for results in (first, second)]
        raise DataError(f"no problem in common: one has {names[0]}, the other {names[1]}")
    return pairs


def _strata(pairs: Mapping[str, list[Pair]]) -> list[tuple[str, Sequence[list[Pair]]]]:
    each = [(name, [benchmark]) for name, benchmark in pairs.items()]
    return [*each, (OVERALL, list(pairs.values()))] if len(pairs) > 1 else [*each]


def _values(pairs: Sequence[Pair], metric: str) -> np.ndarray:
    """Both values of the problems for which both exist: float64 [P, 2]."""
    values = [
        (first["metrics"][metric], second["metrics"][metric])
        for first, second in pairs
        if first["metrics"].get(metric) is not None and second["metrics"].get(metric) is not None
    ]
    return np.array(values, dtype=np.float64).reshape(-1, 2)
