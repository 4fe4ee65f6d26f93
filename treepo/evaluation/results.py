"""results.json: every number of an evaluation in one document, which the tables, the report and the
comparison read.

Keys are never removed. A later version may add keys, and raises `schema` if it changes the meaning of one. A
number that does not exist is null.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from treepo.errors import DataError, one_line, shortened, shown
from treepo.evaluation.metrics import (
    Estimate,
    ProblemResult,
    estimates,
    length_metrics,
    problem_metrics,
)
from treepo.rewards.extraction import AFTER, BOXED, described
from treepo.tree import Stop, Verdict

RESULTS = "results.json"
SCHEMA = 1
_Share = Annotated[float, Field(strict=True, ge=0, le=1)] | None
_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]


class _Interval(TypedDict):
    """An estimate; none of its numbers exists if no problem has a value."""

    value: _Share
    low: _Share
    high: _Share


def _all_or_none(interval: _Interval) -> _Interval:
    if len({number is None for number in interval.values()}) > 1:
        raise ValueError("value, low and high are all null or none is")
    return interval


class _Tokens(TypedDict):
    unique: _Count
    total: _Count


class _Scores(TypedDict):
    metrics: dict[
        Annotated[str, Field(pattern=r"^[a-z_]+(@[0-9]{1,9})?$")],
        Annotated[_Interval, AfterValidator(_all_or_none)],
    ]
    finished: _Count
    tokens: _Tokens


class _Benchmark(_Scores):
    name: str


class _Row(TypedDict):
    id: str
    benchmark: str
    answer: str
    metrics: dict[str, _Share]


class _Sampling(TypedDict):
    width: Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]
    mode: str
    branching: object


class _Settings(TypedDict):
    reward: NotRequired[dict[str, object]]
    data: NotRequired[dict[str, object]]
    seed: Annotated[int, Field(strict=True, ge=0)]
    sampling: _Sampling


class _Results(TypedDict):
    settings: _Settings
    benchmarks: list[_Benchmark]
    overall: _Scores
    problems: list[_Row]


_READ = TypeAdapter(_Results)
"""The keys that the comparison and its plot read."""
OVERALL = "all (by size)"
"""The name of all benchmarks together, each counted by its size."""


def results_document(
    settings: Mapping[str, Any],
    voting: bool,
    benchmarks: Mapping[str, Sequence[ProblemResult]],
    problems: Mapping[str, int],
    failures: Mapping[str, str],
    cost: Mapping[str, float],
) -> dict[str, Any]:
    """settings: the whole configuration. voting: whether the grader extracted answers.

    benchmarks: the finished problems of each benchmark, in order. problems: the size of each benchmark.
    failures: reasons by the ids of the problems that could not be finished. cost: of all sessions together.
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
    return _nan_to_null(document)


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


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: Path) -> dict[str, Any]:
    """Read results.json. path: the file, or the folder of the evaluation. Raises DataError."""
    file = path if path.is_file() else path / RESULTS
    try:
        results = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; name a folder that `treepo eval` has written") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {one_line(error)}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise DataError(f"{file}: not a result of `treepo eval` with schema {SCHEMA}")
    try:
        _READ.validate_python(results)
    except ValidationError as error:
        fault = error.errors()[0]
        key = shortened(".".join(map(str, fault["loc"])))
        raise DataError(f"{file}: {key}: {one_line(fault['msg'])}, found {shown(fault['input'])}") from None
    return results


def score_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a score table: each benchmark, then all of them together if there are several."""
    benchmarks = results["benchmarks"]
    together = {"name": OVERALL} | results["overall"]
    return [*benchmarks, together] if len(benchmarks) > 1 else [*benchmarks]


def score_columns(results: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of a score table with their titles: those of all samples; for trees, the weighted mean."""
    sampling = results["settings"]["sampling"]
    samples = sampling["width"]
    titles = {"mean": f"mean@{samples}"}
    if sampling["mode"] == "tree":
        titles["weighted_mean"] = "weighted"
    if samples > 1:
        titles |= {f"pass@{samples}": f"pass@{samples}", "majority": f"maj@{samples}"}
    return {name: title for name, title in titles.items() if name in results["overall"]["metrics"]}


def extraction_of(settings: Mapping[str, Any]) -> str | None:
    """The evaluation's `reward.answer`; None if a grader of the user's own extracted no answer."""
    reward = settings.get("reward", {})
    return None if reward.get("function") or reward.get("url") else reward.get("answer", BOXED)


def unanswered(results: Mapping[str, Any]) -> str | None:
    """One line that says that most responses have no answer, and which option would help; None if most have.

    If only some benchmarks are like that, the line names them.
    """
    extraction, settings = extraction_of(results["settings"]), results["settings"]
    if extraction is None:
        return None
    rows = [row for row in results["benchmarks"] if _without_answer(row) > row["responses"] / 2]
    if not rows:
        return None
    names = ", ".join(row["name"] for row in rows)
    where = f" ({names})" if len(rows) < len(results["benchmarks"]) else ""
    without, responses = sum(map(_without_answer, rows)), sum(row["responses"] for row in rows)
    line = f"{without} of {responses} responses{where} have no answer: {described(extraction)}"
    if extraction == BOXED:
        line += (
            '; reward.answer=boxed_or_last also reads "the answer is ..." and the last number, or a '
            "--system-prompt can ask for a box"
        )
    elif extraction.startswith(AFTER.partition(":")[0]):
        line += "; reward.answer=boxed_or_last reads boxes, statements and the last number"
    limit = settings["sampling"]["max_response_tokens"]
    cut = sum(row["stops"][Stop.LIMIT] for row in rows)
    if cut > responses / 2:
        line += f"; {cut} were cut off at {limit} tokens (--max-tokens)"
    return line


def _without_answer(row: Mapping[str, Any]) -> int:
    return row["verdicts"][Verdict.NO_ANSWER]


def percent_and_interval(estimate: Mapping[str, float | None] | None) -> tuple[str, str] | None:
    """An estimate in percent, such as ("41.2", "38.0–44.3"); None if it does not exist."""
    if estimate is None or estimate["value"] is None:
        return None
    value, low, high = (_percent(estimate[name] or 0.0) for name in ("value", "low", "high"))
    return value, f"{low}–{high}"


def _percent(share: float) -> str:
    """With one decimal; 100 without, to keep columns narrow."""
    return "100" if share >= 1 else f"{100 * share:.1f}"
