"""report.html: one file that needs no network and runs nothing but its own script.

What models and data files wrote is data, never markup: it is embedded as JSON without any `<`, and the script
puts it in place as text. Completions are rendered when they are opened. Of a large run each text keeps its
beginning and its end; samples.jsonl has all of it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from treepo.data.prompts import Prompt
from treepo.tree import PROMPT, Tree

_TEXT_TOKENS = 5_000_000  # embedded whole; some 20 MB
_SHORTEST = 240  # characters that a shortened text keeps
_ANSWER_CHARACTERS = 200
_PERCENT = "{:.1%}"

Problems = Callable[[], Iterator[tuple[Mapping[str, Any], Tree]]]
"""Every finished problem's line of trees.jsonl and its tree."""


def evaluation_page(
    results: Mapping[str, Any],
    problems: Problems,
    prompts: Mapping[str, Prompt],
    decode: Callable[[np.ndarray], str],
    plot: str,
) -> str:
    """The page of a results document."""
    keep = min(_TEXT_TOKENS / max(results["overall"]["tokens"]["unique"], 1), 1.0)
    rows = {row["id"]: row for row in results["problems"]}
    data = [
        _problem(rows[tree.prompt_id], record, tree, prompts[tree.prompt_id].text, decode, keep)
        for record, tree in problems()
    ]
    settings = results["settings"]
    resources = files("treepo.evaluation.report")
    template = Template((resources / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=(resources / "page.css").read_text(encoding="utf-8"),
        script=(resources / "page.js").read_text(encoding="utf-8"),
        title=escape(f"{settings['out']}"),
        subtitle=escape(_subtitle(settings)),
        scores=_scores(results),
        metrics=_every_metric(results),
        cost=_cost(results["cost"]),
        plot=plot,
        settings=escape(json.dumps(settings, indent=2)),
        shortened="" if keep == 1.0 else "Long texts are shortened here; samples.jsonl has all of them.",
        data=_script_safe({"problems": data}),
    )


def _subtitle(settings: Mapping[str, Any]) -> str:
    model, sampling = settings["model"], settings["sampling"]
    how = "leaves of a tree" if sampling["mode"] == "tree" else "independent samples"
    return (
        f"{model['path'] or model['url']} · {sampling['width']} {how} for each problem · temperature "
        f"{sampling['temperature']} · up to {sampling['max_response_tokens']} tokens"
    )


def _scores(results: Mapping[str, Any]) -> str:
    """The table of benchmarks, as HTML."""
    rows = parts(results)
    samples, tree = (
        results["settings"]["sampling"]["width"],
        results["settings"]["sampling"]["mode"] == "tree",
    )
    metrics = headline_metrics(results["overall"]["metrics"], samples, tree=tree)
    head = "".join(f"<th>{escape(label)}</th>" for label in ("benchmark", "problems", *metrics.values()))
    head += "<th>mean tokens</th><th>truncated</th><th>not graded</th>"
    body = "".join(_score_row(row, list(metrics)) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _every_metric(results: Mapping[str, Any]) -> str:
    """The table of all metrics of all benchmarks, as HTML: a row each metric."""
    columns = parts(results)
    sequential = results["settings"]["sampling"]["mode"] == "sequential"
    hidden = {"weighted_mean"} if sequential else set()  # the mean once more
    head = "".join(f"<th>{escape(part['name'])}</th>" for part in columns)
    body = "".join(
        f"<tr><th scope='row'>{escape(name.replace('_', ' '))}</th>"
        + "".join(_estimate_cell(part["metrics"].get(name)) for part in columns)
        + "</tr>"
        for name in results["overall"]["metrics"]
        if name not in hidden
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def parts(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The benchmarks' scores, and all together where there are several."""
    benchmarks = results["benchmarks"]
    together = {"name": "all (by size)"} | results["overall"]
    return [*benchmarks, together] if len(benchmarks) > 1 else [*benchmarks]


def headline_metrics(metrics: Mapping[str, Any], samples: int, *, tree: bool) -> dict[str, str]:
    """The metrics that a table shows, with their heads: of all samples, and a tree's weighted mean."""
    shown = {"mean": f"mean@{samples}"}
    if tree:
        shown["weighted_mean"] = "weighted"
    if samples > 1:
        shown |= {f"pass@{samples}": f"pass@{samples}", "majority": f"maj@{samples}"}
    return {name: label for name, label in shown.items() if name in metrics}


def _score_row(row: Mapping[str, Any], metrics: list[str]) -> str:
    cells = [f"<th scope='row'>{escape(row['name'])}</th>", f"<td>{row['finished']}/{row['problems']}</td>"]
    cells += [_estimate_cell(row["metrics"].get(name)) for name in metrics]
    tokens, ungraded = row["response_tokens"], row["verdicts"]["timeout"] + row["verdicts"]["error"]
    for value, form in ((tokens["mean"], "{:.0f}"), (tokens["truncated"], _PERCENT), (ungraded, "{}")):
        cells.append(f"<td>{'–' if value is None else form.format(value)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _estimate_cell(estimate: Mapping[str, float | None] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "<td>–</td>"
    value, low, high = (percent(estimate[name] or 0.0) for name in ("value", "low", "high"))
    return f"<td>{value}<small>{low}–{high}</small></td>"


def percent(share: float) -> str:
    """With one decimal, which 100 does without."""
    return "100" if share >= 1 else f"{100 * share:.1f}"


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
    prompt: str,
    decode: Callable[[np.ndarray], str],
    keep: float,
) -> dict[str, Any]:
    return {
        "id": row["id"],
        "benchmark": row["benchmark"],
        "prompt": prompt,
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
    """Beginning and end of a text that is longer than so many characters."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters left out … {text[-half:]}"


def _script_safe(value: object) -> str:
    """JSON in which no HTML parser can see a tag, a comment or an entity."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
