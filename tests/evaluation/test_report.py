"""report.html and the plot: parsed as a browser would, with texts that a hostile model could write."""

import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.support.evaluations import config_of, document, graded_problem, prompt_of, record_of
from tests.support.hostile import HOSTILE
from treepo.evaluation.report import page
from treepo.evaluation.report.page import evaluation_page
from treepo.evaluation.report.plot import accuracy_plot, curve
from treepo.evaluation.results import unanswered
from treepo.tree import Verdict

MARKUP = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]><img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; \u2028 \u2029",
    "<link rel=stylesheet href=https://example.com/x.css>",
    "$data ${script} {{style}}",
]
TEXTS = [*MARKUP, *(text[:20_000] for text in HOSTILE.values())]
C, W, N, T = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.TIMEOUT


class Page(HTMLParser):
    """Tags, attributes and the texts of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.titles: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img", "br"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        if "header" in self.open:
            self.headings.append(data)


def hostile_page(title: str = "out/<b>x</b>", **sections: Any) -> tuple[str, dict[str, Any]]:
    """The page of two benchmarks with hostile problems and responses, and its results document."""
    config = config_of(title, 4, ("a", "b"), model={"path": "</style><script>m"}, **sections)
    benchmarks = {
        name: [
            (prompt, graded_problem(prompt, [C, W, N, T], parents=[-1, 0, 0, -1, 3, 3]))
            for index, text in enumerate(TEXTS)
            for prompt in [prompt_of(name, index, text=text[:5000], answer=text[:5000])]
        ]
        for name in ("a", "b")
    }
    results = document(config, benchmarks)
    pairs = [pair for problems in benchmarks.values() for pair in problems]
    prompts = {prompt.id: prompt for prompt, _ in pairs}
    lines = [(record_of(problem, prompt), problem.tree) for prompt, problem in pairs]

    def decode(tokens: np.ndarray) -> str:
        return TEXTS[int(tokens[0]) % len(TEXTS)]

    plot = accuracy_plot([curve(results, title)])
    return evaluation_page(results, lambda: iter(lines), prompts, decode, plot), results


@pytest.fixture(scope="module")
def hostile() -> tuple[str, Page]:
    text, _ = hostile_page()
    return text, Page(text)


def test_the_page_has_its_own_two_scripts_and_every_tag_is_closed(hostile: tuple[str, Page]) -> None:
    _, parsed = hostile
    assert not parsed.open
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"img", "link", "iframe", "object", "base", "form"}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]


def test_the_page_refers_to_nothing_outside(hostile: tuple[str, Page]) -> None:
    text, parsed = hostile
    assert not [
        value for _, attributes in parsed.tags for name in ("src", "href") if (value := attributes.get(name))
    ]
    data, script = parsed.scripts
    rest = text.replace(data, "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w|url\(|@import", rest)
    assert "innerHTML" not in script
    policy = next(attributes["content"] for tag, attributes in parsed.tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_texts_come_back_whole(hostile: tuple[str, Page]) -> None:
    _, parsed = hostile
    problems = json.loads(parsed.scripts[0])["problems"]
    assert len(problems) == 2 * len(TEXTS)
    for index, text in enumerate(MARKUP):
        assert problems[index]["question"] == text
        assert problems[index]["prompt"] == f"[system]Box it.[user]{text}"
    segments = problems[0]["segments"]
    assert segments[0] == [-1, 1, MARKUP[0]]
    assert [parent for parent, _, _ in segments] == [-1, 0, 0, -1, 3, 3]
    assert [verdict for _, verdict, _, _ in problems[0]["leaves"]] == [
        "correct",
        "wrong",
        "no_answer",
        "timeout",
    ]


def test_a_large_run_is_shortened_to_what_a_browser_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = hostile_page()
    monkeypatch.setattr(page, "_TEXT_TOKENS", 1)
    text, _ = hostile_page()
    assert len(text) < len(whole) / 3
    assert "characters left out" in text
    assert "samples.jsonl has them whole" in text


def test_the_scores_on_the_page_are_those_of_the_document() -> None:
    text, results = hostile_page()
    mean = results["benchmarks"][0]["metrics"]["mean"]["value"]
    assert f"{100 * mean:.1f}<small>" in text
    assert "all (by size)" in text


def small_page(**sections: Any) -> str:
    """One problem with a response of each of four verdicts."""
    config = config_of("/home/me/out", 4, **sections)
    prompt = prompt_of("b", 0)
    problem = graded_problem(prompt, [C, W, N, T])
    results = document(config, {"b": [(prompt, problem)]})
    lines = [(record_of(problem, prompt), problem.tree)]
    return evaluation_page(results, lambda: iter(lines), {prompt.id: prompt}, lambda _: "text", "")


def test_the_title_names_model_and_benchmarks_and_no_folder() -> None:
    parsed = Page(small_page(model={"path": "/home/me/models/Qwen<b>"}))
    assert parsed.titles == ["treepo eval: Qwen<b>: b"]
    assert "/home/me" not in "".join(parsed.headings)


def test_the_shares_of_all_verdicts_are_on_the_page() -> None:
    text = small_page()
    assert "<td>25.0%</td><td>25.0%</td><td>25.0%</td><td>25.0%</td><td>0.0%</td>" in text
    assert "<th>correct</th><th>wrong</th><th>no answer</th><th>timeout</th><th>error</th>" in text


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({}, r"the answer is the last \boxed{...}"),
        ({"answer": "after:####"}, "the answer is what follows the last &quot;####&quot;"),
        ({"function": "m:f"}, "graded by m:f"),
    ],
)
def test_the_page_says_what_counts_as_an_answer(reward: dict[str, str], said: str) -> None:
    assert said in small_page(reward=reward)


def unanswered_of(verdicts: dict[str, list[Verdict]], **sections: Any) -> str | None:
    config = config_of("out", 4, tuple(verdicts), **sections)
    return unanswered(
        document(
            config,
            {
                name: [(prompt_of(name, 0), graded_problem(prompt_of(name, 0), shown))]
                for name, shown in verdicts.items()
            },
        )
    )


def test_most_responses_without_an_answer_are_one_line_with_the_option_that_helps() -> None:
    line = unanswered_of({"a": [N, N, N, C], "b": [N, N, W, C]})
    assert line is not None
    assert line.startswith("3 of 4 responses (a) have no answer: the last \\boxed{...}; reward.")
    assert "reward.answer=boxed_or_last" in line
    line = unanswered_of({"a": [N, N, N, C]}, reward={"answer": "after:####"})
    assert line is not None
    assert line.startswith('3 of 4 responses have no answer: what follows the last "####"; ')
    line = unanswered_of({"a": [N, N, N, C]}, reward={"answer": "boxed_or_last"})
    assert line is not None
    assert "reward.answer" not in line
    assert unanswered_of({"a": [N, N, W, C]}) is None
    assert unanswered_of({"a": [N, N, N, N]}, reward={"function": "m:f"}) is None


def test_accuracy_goes_from_0_to_1_whatever_the_values_are() -> None:
    prompt = prompt_of("b", 0)
    for verdicts in ([W, W, W, W], [C, C, C, C], [C, W, W, W]):
        results = document(config_of("out", 4), {"b": [(prompt, graded_problem(prompt, verdicts))]})
        svg = ElementTree.fromstring(accuracy_plot([curve(results, "x")]))
        texts = [node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert texts[:6] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_the_plot_is_xml_whatever_the_evaluations_are_called() -> None:
    config = config_of("out", 4)
    prompt = prompt_of("b", 0)
    results = document(config, {"b": [(prompt, graded_problem(prompt, [C, W, W, C]))]})
    svg = accuracy_plot([curve(results, "<&'\">"), curve(results, "second")])
    texts = [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "<&'\"> (sequential, n = 4)" in texts
    nothing = document(config, {"b": [(prompt, graded_problem(prompt, [T, T, T, T]))]})
    ElementTree.fromstring(accuracy_plot([curve(nothing, "nothing graded")]))


def test_k_of_n_samples_cost_their_share_and_a_tree_is_one_point_for_each_metric() -> None:
    prompt = prompt_of("b", 0)
    sequential = [(prompt, graded_problem(prompt, [C, W, W, C]))]
    points = curve(document(config_of("out", 4), {"b": sequential}), "x").points
    assert [point.tokens for point in points["pass"]] == [1, 2, 4]
    assert [point.tokens for point in points["maj"]] == [2, 4]
    in_tree = [(prompt, graded_problem(prompt, [C, W, W, C], parents=[-1, 0, 0, -1, 3, 3]))]
    tree = config_of("out", 4, sampling={"width": 4, "mode": "tree"})
    points = curve(document(tree, {"b": in_tree}), "x").points
    assert {kind: [point.tokens for point in series] for kind, series in points.items()} == {
        "maj": [6],
        "pass": [6],
        "mean": [6],
    }
