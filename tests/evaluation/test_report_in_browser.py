"""report.html in a real browser: no text of a model runs, loads or opens anything."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluation.test_report import MARKUP, hostile_page
from tests.support.browser import CHROMIUM, Tab, browser
from tests.support.evaluations import config_of, document, graded_problem, prompt_of, record_of
from treepo.evaluation.report.page import evaluation_page
from treepo.tree import Verdict

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
]

OPEN_ALL = """
document.querySelectorAll("button.open").forEach((button) => button.click());
document.querySelectorAll("details").forEach((part) => {
  part.open = true;
  part.dispatchEvent(new Event("toggle"));
});
document.querySelectorAll("#problems rect").forEach((part) => part.dispatchEvent(new Event("click")));
"""
WATCH = """
document.addEventListener("securitypolicyviolation",
  (event) => (window.refused ??= []).push(event.effectiveDirective));
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        yield tab


def requests(tab: Tab) -> list[str]:
    return [event["request"]["url"] for name, event in tab.events if name == "Network.requestWillBeSent"]


def test_hostile_texts_are_shown_and_nothing_else(tab: Tab, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(hostile_page()[0], encoding="utf-8")
    tab.open(path)
    tab.evaluate(OPEN_ALL)
    shown = tab.evaluate("document.body.innerText")
    assert all(text.split()[0] in shown for text in MARKUP)
    assert tab.evaluate("document.querySelectorAll('#problems rect').length") > 0
    assert tab.evaluate("document.scripts.length") == 2
    assert tab.evaluate("document.querySelectorAll('img, link, iframe, object').length") == 0
    assert tab.evaluate("window.refused ?? []") == []  # its own script and styles are allowed
    assert requests(tab) == [path.as_uri()]
    assert "Page.javascriptDialogOpening" not in tab.names()


@pytest.mark.parametrize("width", [1280, 390])
def test_long_names_fit_the_window(tab: Tab, tmp_path: Path, width: int) -> None:
    name = "a_benchmark_" + "with_a_long_name_" * 4
    prompt = prompt_of(name, 0)
    problem = graded_problem(prompt, [Verdict.CORRECT, Verdict.WRONG])
    results = document(config_of("out", 2, (name, "b")), {name: [(prompt, problem)], "b": []})
    problems = [(record_of(problem, prompt), problem.tree)]
    page = evaluation_page(
        results, lambda: iter(problems), {prompt.id: prompt}, lambda _: "text", "<svg></svg>"
    )
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    tab.look(width=width)
    tab.open(path)
    tab.evaluate(OPEN_ALL)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


ATTACKS = {
    "script": "<script>window.hit = 1</script>",
    "image": "<img src='missing.png' onerror='window.hit = 1'>",
    "drawing": "<svg onload='window.hit = 1'></svg>",
    "frame": "<iframe srcdoc='<script>parent.hit = 1</script>'></iframe>",
    "link": "<a id='bait' href='javascript:window.hit = 1'>x</a>",
    "base": "<base href='https://example.com/'><script>window.hit = 1</script>",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_markup_in_the_page_itself_runs_only_without_its_policy(
    attack: str, tab: Tab, tmp_path: Path
) -> None:
    attacked = hostile_page()[0].replace("<main>", f"<main>{attack}")
    path = tmp_path / "report.html"
    for text, hit in ((attacked, None), (re.sub(r"<meta http-equiv[^>]*>", "", attacked), 1)):
        path.write_text(text, encoding="utf-8")
        tab.open(path)
        tab.evaluate("document.getElementById('bait')?.click()")
        tab.evaluate("new Promise((done) => setTimeout(done, 0))")  # after the click's own task
        assert tab.evaluate("window.hit ?? null") == hit


def test_the_page_loads_no_style_sheet_of_another_server(tab: Tab, tmp_path: Path) -> None:
    sheet = "<link rel='stylesheet' href='https://example.com/x.css'>"
    path = tmp_path / "report.html"
    path.write_text(hostile_page()[0].replace("<main>", f"<main>{sheet}"), encoding="utf-8")
    tab.open(path)
    assert tab.evaluate("window.refused") == ["style-src-elem"]
