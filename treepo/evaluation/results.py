"""An evaluation's numbers as one JSON document: results.json, which the report and the comparison read.

Its keys stay: a later version adds, and raises `schema` where the meaning of one changes. A number that does
not exist is null.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from treepo.evaluation.metrics import (
    Estimate,
    ProblemResult,
    estimates,
    length_metrics,
    problem_metrics,
)
from treepo.tree import Stop, Verdict

SCHEMA = 1


def results_document(
    settings: Mapping[str, Any],
    voting: bool,
    benchmarks: Mapping[str, Sequence[ProblemResult]],
    problems: Mapping[str, int],
    failures: Mapping[str, str],
    cost: Mapping[str, float],
) -> dict[str, Any]:
    """settings: the whole configuration. voting: whether answers were extracted.

    benchmarks: finished problems by benchmark, in order. problems: how many each benchmark has. failures: the
    reason, by the id of a problem that could not be finished. cost: of all sessions together.
    """
    samples, seed = settings["sampling"]["width"], settings["seed"]
    metrics = {
        name: [problem_metrics(problem, samples, seed, voting=voting) for problem in finished]
        for name, finished in benchmarks.items()
    }
    everything = [problem for finished in benchmarks.values() for problem in finished]
    document = {
        "schema": SCHEMA,
        "settings": settings,
        "benchmarks": [
            {"name": name, "problems": problems[name]} | _scores(finished, estimates([metrics[name]], seed))
            for name, finished in benchmarks.items()
        ],
        "overall": {"problems": sum(problems.values())}
        | _scores(everything, estimates(list(metrics.values()), seed)),
        "cost": dict(cost),
        "failures": dict(failures),
        "problems": [
            _problem_row(problem, row)
            for name, finished in benchmarks.items()
            for problem, row in zip(finished, metrics[name], strict=True)
        ],
    }
    return _without_nan(document)


def _scores(finished: Sequence[ProblemResult], scores: Mapping[str, Estimate]) -> dict[str, Any]:
    verdicts = Counter(verdict for problem in finished for verdict in problem.verdicts_L)
    stops = Counter(stop for problem in finished for stop in problem.stops_L)
    return {
        "finished": len(finished),
        "responses": verdicts.total(),
        "metrics": {name: asdict(score) for name, score in scores.items()},
        "verdicts": {verdict: verdicts[verdict] for verdict in Verdict},
        "stops": {stop: stops[stop] for stop in Stop},
        "response_tokens": length_metrics(finished),
        "tokens": {
            "unique": sum(problem.unique_tokens for problem in finished),
            "total": sum(sum(problem.tokens_L) for problem in finished),
        },
    }


def _problem_row(problem: ProblemResult, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "id": problem.id,
        "benchmark": problem.benchmark,
        "answer": problem.answer,
        "responses": len(problem.verdicts_L),
        "graded": problem.graded,
        "correct": problem.correct,
        "unique_tokens": problem.unique_tokens,
        "total_tokens": sum(problem.tokens_L),
        "metrics": dict(metrics),
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
