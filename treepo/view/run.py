"""The part "Run" of the page: what the metrics, configuration, log, status and results of runs say."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from treepo.config.dotted import by_dotted_key
from treepo.config.yaml_text import read_mapping
from treepo.data.output_folder import CONFIG, LOG, SUMMARY, TREES
from treepo.errors import DataError, one_line
from treepo.evaluation.results import (
    RESULTS,
    percent_and_interval,
    read_results,
    score_columns,
    score_rows,
)
from treepo.run_status import read_status
from treepo.training.metric_table import meaning
from treepo.training.run_folder import METRICS
from treepo.view.log_lines import events, log_entries
from treepo.view.metrics_table import metrics_table
from treepo.view.part import Part, Query, number
from treepo.view.sources import Source
from treepo.watchdog import STATUS

_FILES = (
    "vendor/uPlot.min.css",
    "page/run.css",
    "vendor/uPlot.iife.min.js",
    "page/charts.js",
    "page/run-lines.js",
    "page/run-tables.js",
    "page/run.js",
)
_MOST_ENTRIES = 2000  # of the log, the last
_CHANGING = (METRICS, LOG, SUMMARY, RESULTS, CONFIG)
_PASSWORD = re.compile(r"://[^/\s]*@")  # of a URL, with its user


def run_part(sources: Sequence[Source]) -> Part:
    """The tab "Run" of these sources. Each question has the key `source`, an index into them."""

    def of_source(answer: Any) -> Any:
        return lambda query: answer(sources[number(query, "source", len(sources))].folder)

    answers = {"state": state, "metrics": metrics, "settings": settings, "log": log, "result": result}

    def exported() -> Iterator[tuple[str, Query]]:
        for index in range(len(sources)):
            for question in answers:
                yield question, {"source": str(index)}

    by_source = {name: of_source(answer) for name, answer in answers.items()}
    empty = not any((source.folder / name).exists() for source in sources for name in _CHANGING)
    return Part("run", "Run", _FILES, by_source, exported, empty)


def state(folder: Path) -> dict[str, Any]:
    """`files`: a text that changes when one of the files does. `trees`: whether there is a file of them.
    `status`: None if the run has not written one; else its state, and `fault`: why a run that has not ended
    does not go on, or "".
    """
    found = [(folder / name).stat() for name in _CHANGING if (folder / name).exists()]
    files = " ".join(f"{file.st_size}-{file.st_mtime_ns}" for file in found)
    about = {"files": files, "trees": (folder / TREES).exists()}
    if not (folder / STATUS).exists():
        return about | {"status": None}
    status = read_status(folder)
    shown = status.model_dump(include={"state", "reason", "step", "steps", "phase"})
    waits = [f"{wait.who} waits for {wait.whom}" for wait in status.waits]
    return about | {"status": shown | {"fault": status.fault(), "waits": waits}}


def metrics(folder: Path) -> dict[str, Any]:
    """What `metrics_table` returns, and `meanings`: by metric, what it means and what is healthy."""
    table = metrics_table(folder / METRICS)
    return table | {"meanings": {name: text for name in table["columns"] if (text := _meaning(name))}}


def settings(folder: Path) -> dict[str, str]:
    """The values of config.yaml as text, by dotted key; passwords in URLs are left out."""
    if not (folder / CONFIG).exists():
        return {}
    return {key: _text(value) for key, value in by_dotted_key(read_mapping(folder / CONFIG)[0]).items()}


def log(folder: Path) -> dict[str, Any]:
    """`entries`: the last of the log, and `events`: those of it that `log_lines.events` chooses."""
    entries = log_entries(folder / LOG)
    return {"entries": entries[-_MOST_ENTRIES:], "events": events(entries)}


def result(folder: Path) -> dict[str, Any]:
    """`summary`: that of a finished run, by dotted key. `scores`: the table of an evaluation, its
    head and its rows, each a list of texts.
    """
    summary, scores = {}, []
    if (folder / SUMMARY).exists():
        summary = _summary(folder / SUMMARY)
    if (folder / RESULTS).exists():
        scores = _scores(read_results(folder))
    return {"summary": summary, "scores": scores}


def _scores(results: dict[str, Any]) -> list[list[str]]:
    columns = score_columns(results)
    rows = [["", "problems", *columns.values()]]
    for row in score_rows(results):
        shares = [percent_and_interval(row["metrics"].get(name)) for name in columns]
        cells = ["–" if share is None else f"{share[0]}% ({share[1]})" for share in shares]
        rows.append([row["name"], f"{row['finished']}", *cells])
    return rows


def _summary(path: Path) -> dict[str, Any]:
    try:
        return by_dotted_key(orjson.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not the summary of a run: {one_line(error)}") from None


def _meaning(name: str) -> str:
    text, healthy = meaning(name) or ("", "")
    return f"{text}\nhealthy: {healthy}".replace("`", "") if healthy else text.replace("`", "")


def _text(value: object) -> str:
    return _PASSWORD.sub("://...@", value if isinstance(value, str) else json.dumps(value))
