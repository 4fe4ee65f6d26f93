"""report.html: one file that needs no network and runs no script but its own.

Text from models and data files is never markup: it is embedded as JSON without any `<`, and the script
inserts it as text. Even if some did become markup, the page's policy would let a browser run only the script
and the style sheets whose hashes it names, and load nothing. A response is rendered when it is opened. In a
large evaluation each text keeps only its beginning and its end; samples.jsonl has all of it.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from treepo.config.truncation import sampling_line
from treepo.data.prompts import Prompt
from treepo.evaluation.report.plot import STYLE
from treepo.evaluation.results import (
    extraction_of,
    percent_and_interval,
    score_columns,
    score_rows,
    unanswered,
)
from treepo.rewards.extraction import described
from treepo.tree import PROMPT, Tree, Verdict

_TEXT_TOKENS = 5_000_000  # up to here texts are embedded whole, in about 20 MB
_SHORTEST = 240  # characters that a shortened text keeps at least
_ANSWER_CHARACTERS = 200
_PERCENT = "{:.1%}"

Problems = Callable[[], Iterator[tuple[Mapping[str, Any], Tree]]]
"""Yields each finished problem's record of trees.jsonl and its tree."""


def evaluation_page(
    results: Mapping[str, Any],
    problems: Problems,
    prompts: Mapping[str, Prompt],
    decode: Callable[[np.ndarray], str],
    plot: str,
) -> str:
    """The page of a results document. plot: an SVG."""
    keep = min(_TEXT_TOKENS / max(results["overall"]["tokens"]["unique"], 1), 1.0)
    rows = {row["id"]: row for row in results["problems"]}
    data = [
        _problem(rows[tree.prompt_id], record, tree, prompts[tree.prompt_id], decode, keep)
        for record, tree in problems()
    ]
    settings = results["settings"]
    resources = files("treepo.evaluation.report")
    template, style, script = (
        (resources / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    return Template(template).substitute(
        style=style,
        script=script,
        styles=f"{_hash(style)} {_hash(STYLE)}",
        scripts=_hash(script),
        title=escape(_title(settings)),
        subtitle=escape(_subtitle(settings)),
        scores=_scores(results),
        verdicts=_verdicts(results),
        unanswered=escape(unanswered(results) or ""),
        metrics=_every_metric(results),
        cost=_cost(results["cost"]),
        plot=plot,
        settings=escape(json.dumps(settings, indent=2)),
        shortened="" if keep == 1.0 else "Long texts are shortened here; samples.jsonl has them whole.",
        data=_script_safe({"problems": data}),
    )


def _hash(text: str) -> str:
    """A source of a content-security policy: the script or style sheet with exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(settings: Mapping[str, Any]) -> str:
    """The model and the benchmarks, without the folders that they are in."""
    benchmarks = (one["name"] or Path(one["path"]).stem for one in settings["data"]["benchmarks"])
    model = settings["model"]
    return f"{Path(model['path']).name if model['path'] else model['url']}: {', '.join(benchmarks)}"


def _subtitle(settings: Mapping[str, Any]) -> str:
    reward, extraction = settings["reward"], extraction_of(settings)
    graded = (
        f"graded by {reward['function'] or reward['url']}"
        if extraction is None
        else f"the answer is {described(extraction)}"
    )
    return f"{sampling_line(settings['sampling'], 'problem')} · {graded}"


def _scores(results: Mapping[str, Any]) -> str:
    """The table of benchmarks, as HTML."""
    metrics = score_columns(results)
    head = "".join(f"<th>{escape(label)}</th>" for label in ("benchmark", "problems", *metrics.values()))
    head += "<th>mean tokens</th><th>truncated</th>"
    body = "".join(_score_row(row, list(metrics)) for row in score_rows(results))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _verdicts(results: Mapping[str, Any]) -> str:
    """The table of the verdicts' shares, each with a bar, as HTML."""
    head = "".join(f"<th>{verdict.replace('_', ' ')}</th>" for verdict in Verdict)
    body = "".join(_verdict_row(row) for row in score_rows(results))
    return (
        f"<table><thead><tr><th>benchmark</th><th>responses</th>{head}<th></th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _verdict_row(row: Mapping[str, Any]) -> str:
    responses, shares, at = row["responses"], "", 0.0
    bar = ""
    for verdict in Verdict:
        share = row["verdicts"][verdict] / responses if responses else 0.0
        shares += f"<td>{_PERCENT.format(share)}</td>"
        bar += f"<rect class='{verdict}' x='{100 * at:.2f}%' width='{100 * share:.2f}%' height='14'/>"
        at += share
    return (
        f"<tr><th scope='row'>{escape(row['name'])}</th><td>{responses:,}</td>{shares}"
        f"<td class='bar'><svg height='14' aria-hidden='true'>{bar}</svg></td></tr>"
    )


def _every_metric(results: Mapping[str, Any]) -> str:
    """The table of all metrics of all benchmarks, as HTML: one row a metric."""
    columns = score_rows(results)
    sequential = results["settings"]["sampling"]["mode"] == "sequential"
    hidden = {"weighted_mean"} if sequential else set()  # equal to the mean
    head = "".join(f"<th>{escape(part['name'])}</th>" for part in columns)
    body = "".join(
        f"<tr><th scope='row'>{escape(name.replace('_', ' '))}</th>"
        + "".join(_estimate_cell(part["metrics"].get(name)) for part in columns)
        + "</tr>"
        for name in results["overall"]["metrics"]
        if name not in hidden
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _score_row(row: Mapping[str, Any], metrics: list[str]) -> str:
    cells = [f"<th scope='row'>{escape(row['name'])}</th>", f"<td>{row['finished']}/{row['problems']}</td>"]
    cells += [_estimate_cell(row["metrics"].get(name)) for name in metrics]
    tokens = row["response_tokens"]
    for value, form in ((tokens["mean"], "{:.0f}"), (tokens["truncated"], _PERCENT)):
        cells.append(f"<td>{'–' if value is None else form.format(value)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _estimate_cell(estimate: Mapping[str, float | None] | None) -> str:
    text = percent_and_interval(estimate)
    return "<td>–</td>" if text is None else f"<td>{text[0]}<small>{text[1]}</small></td>"


def _cost(cost: Mapping[str, float]) -> str:
    pairs = (
        ("tokens decoded", f"{cost['decoded_tokens']:,.0f}"),
        ("tokens prefilled", f"{cost['prefilled_tokens']:,.0f}"),
        ("tokens found in the prefix cache", f"{cost['cached_tokens']:,.0f}"),
        ("tokens/s", f"{cost['tokens_per_second']:,.0f}"),
        ("responses/s", f"{cost['trajectories_per_second']:,.2f}"),
        ("seconds of sampling", f"{cost['seconds']:,.1f}"),
        ("device-seconds", f"{cost['device_seconds']:,.1f}"),
    )
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)


def _problem(
    row: Mapping[str, Any],
    record: Mapping[str, Any],
    tree: Tree,
    prompt: Prompt,
    decode: Callable[[np.ndarray], str],
    keep: float,
) -> dict[str, Any]:
    return {
        "id": row["id"],
        "benchmark": row["benchmark"],
        "question": prompt.question,
        "prompt": prompt.text,
        "gold": _short(row["answer"], _ANSWER_CHARACTERS),
        "mean": row["metrics"]["mean"],
        "majority": row["metrics"].get("majority"),
        "tokens": row["unique_tokens"],
        "total": row["total_tokens"],
        "segments": [
            [
                -1 if segment.parent == PROMPT else segment.parent,
                len(segment.tokens),
                _shortened(decode(segment.tokens), keep),
            ]
            for segment in tree.segments
        ],
        "leaves": [
            [
                leaf.segment,
                leaf.verdict,
                leaf.stop,
                None if answer is None else _short(answer, _ANSWER_CHARACTERS),
            ]
            for leaf, answer in zip(tree.leaves, record["answers"], strict=True)
        ],
    }


def _shortened(text: str, keep: float) -> str:
    return text if keep == 1.0 else _short(text, max(int(len(text) * keep), _SHORTEST))


def _short(text: str, characters: int) -> str:
    """The beginning and the end of a text that is longer than `characters`."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters left out … {text[-half:]}"


def _script_safe(value: object) -> str:
    """JSON in which an HTML parser sees no tag, comment or entity."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
