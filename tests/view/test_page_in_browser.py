"""The page in a real browser: what it draws, by keyboard too, and that no text of a run runs or loads."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.browser import CHROMIUM, Tab, browser
from tests.support.paths import ROOT
from tests.support.run_folders import LOG, step, write_run_folder
from tests.view.test_page import HOSTILE, pages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
]

CAPTION = "document.querySelector('figcaption .soft').textContent"
CHARTS = "[...document.querySelectorAll('#run .chart')].filter((chart) => !chart.hidden).length"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


def export(folder: Path, page: Path) -> Path:
    page.write_text(pages(folder)[1], encoding="utf-8")
    return page


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    write_run_folder(tmp_path / "runs/first", steps=4)
    write_run_folder(tmp_path / "runs/second", steps=3, config="seed: 2\n")
    return export(tmp_path / "runs", tmp_path / "page.html")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_its_window_and_the_console_is_empty(
    tab: Tab, exported: Path, width: int, dark: bool
) -> None:
    tab.look(width=width, dark=dark)
    tab.open(exported)
    tab.until("document.querySelector('#run canvas')")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor === 'rgb(246, 247, 249)'")
    assert light is not dark
    assert tab.faults() == []


def test_runs_are_overlaid_and_can_be_hidden(tab: Tab, exported: Path) -> None:
    tab.open(exported)
    tab.until("document.querySelector('#run canvas')")
    values = "[...document.querySelectorAll('.legend')][0].textContent"
    assert tab.evaluate(values) == "reward0.40.3"
    tab.evaluate("document.querySelectorAll('.runs input')[1].click()")
    assert tab.evaluate(values) == "reward0.4"


def test_only_different_settings_are_shown_at_first(tab: Tab, exported: Path) -> None:
    tab.open(exported)
    tab.until("document.querySelector('#run canvas')")
    table = (
        "[...document.querySelectorAll('details')].find((d) => d.textContent.includes('only differences'))"
    )
    rows = f"{table}.querySelectorAll('tbody tr')"
    assert tab.evaluate(f"[...{rows}].map((row) => row.textContent)") == ["seed12"]


def test_a_chart_is_read_and_zoomed_by_keyboard(tab: Tab, exported: Path) -> None:
    tab.look(width=1280)
    tab.open(exported)
    tab.until("document.querySelector('#run canvas')")
    tab.evaluate("document.querySelector('.chart [role=img]').focus()")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        tab.press(key)
        seen.append(tab.evaluate(CAPTION))
    assert seen == ["step 1", "step 2", "step 1", "step 1"]
    for key in ("+", *["ArrowRight"] * 3):
        tab.press(key)
    assert tab.evaluate(CAPTION) == "step 2"  # the last one that is shown
    for key in ("Escape", "ArrowRight"):
        tab.press(key)
    assert tab.evaluate(CAPTION) == "step 3"


LINK = "document.querySelector('figcaption button')"


def test_a_step_of_a_curve_leads_to_its_trees(tab: Tab, exported: Path) -> None:
    tab.look(width=1280)
    tab.open(exported)
    tab.until("document.querySelector('#run canvas')")
    assert tab.evaluate(f"{LINK}.hidden") is True
    left, top, width, height = tab.evaluate(
        "(({left, top, width, height}) => [left, top, width, height])"
        "(document.querySelector('#run .u-over').getBoundingClientRect())"
    )
    place = {"x": left + width * 2 / 3 + 2, "y": top + height / 2}
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        tab.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
    assert tab.evaluate(f"{LINK}.textContent") == "trees of step 3"
    tab.evaluate(f"{LINK}.click()")
    tab.until("document.querySelector('#trees [role=status]')?.textContent === '1 of 4 trees'")
    assert tab.evaluate("location.hash") == "#trees/0/step-3"
    assert tab.evaluate("document.querySelector('#trees [aria-label=Step]').value") == "3"
    tab.evaluate("document.querySelector('#trees .row').click()")
    tab.until("document.querySelector('#trees .detail h2')?.checkVisibility()")
    assert "step 3" in tab.evaluate("document.querySelector('#trees .detail').textContent")
    assert tab.faults() == []


def test_a_run_without_trees_has_no_link_to_them(tab: Tab, tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run")
    (run / "trees.jsonl").unlink()
    tab.open(export(run, tmp_path / "page.html"))
    tab.until("document.querySelector('#run canvas')")
    tab.evaluate("document.querySelector('.chart [role=img]').focus()")
    tab.press("ArrowRight")
    assert tab.evaluate(f"{LINK}.hidden") is True


def test_a_metric_says_what_it_means(tab: Tab, exported: Path) -> None:
    tab.open(exported)
    tab.until("document.querySelector('#run canvas')")
    legend = "document.querySelector('.legend button')"
    assert tab.evaluate(f"{legend}.textContent").startswith("reward")
    assert (
        tab.evaluate(f"{legend}.title") == "mean reward of the graded leaves, without terms\nhealthy: rises"
    )


def test_every_control_is_reached_by_tab(tab: Tab, exported: Path) -> None:
    tab.open(exported)
    tab.until("document.querySelector('#run canvas')")
    reached = set()
    for _ in range(12):
        tab.press("Tab")
        reached.add(tab.evaluate("document.activeElement.type ?? document.activeElement.role"))
    assert {"checkbox", "select-one", "range", "search", "submit"} <= reached


def test_every_metric_has_a_chart_and_can_be_found(tab: Tab, tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(3, **{"grader/steps": 2.0})) + "\n")
    tab.open(export(run, tmp_path / "page.html"))
    tab.until("document.querySelector('#run canvas')")
    tab.evaluate("document.querySelector('[placeholder=metric]').focus()")
    for letter in "GRADER":
        tab.press(letter)
    tab.until(f"{CHARTS} === 1 && document.querySelector('#run details').open")
    shown = "[...document.querySelectorAll('.chart')].find((chart) => !chart.hidden).innerText"
    assert "grader/steps" in tab.evaluate(shown)


def test_hostile_texts_are_shown_and_nothing_else(tab: Tab, tmp_path: Path) -> None:
    config = f"reward:\n  function: {json.dumps(HOSTILE)}\n"
    run = write_run_folder(
        tmp_path / HOSTILE.replace("/", "_"), config=config, log=LOG.replace("it died", HOSTILE)
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(3, **{HOSTILE: 1.0})) + "\n")
    page = export(run, tmp_path / "page.html")
    tab.open(page)
    tab.until("document.querySelector('#run canvas')")
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    tab.until(f"document.body.innerText.split({json.dumps(HOSTILE)}).length > 3")
    assert tab.evaluate("window.hit ?? null") is None
    assert tab.evaluate("document.querySelectorAll('img, link, iframe, object').length") == 0
    requests = [event["request"]["url"] for name, event in tab.events if name == "Network.requestWillBeSent"]
    assert requests == [page.as_uri()]
    assert tab.faults() == []


@contextmanager
def viewing(run: Path) -> Iterator[str]:
    """`treepo view` in a process of its own; yields its address."""
    code = "from treepo.cli.main import main; main()"
    command = [sys.executable, "-c", code, "view", "--no-open", str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()
            assert process.wait(60) == 0


def test_a_live_page_follows_its_run(tab: Tab, tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run")
    with viewing(run) as address:
        tab.open(address)
        tab.until("document.querySelector('.legend')?.textContent === 'reward0.2'")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step(3)) + "\n")
        tab.until("document.querySelector('.legend').textContent === 'reward0.3'")
        (run / "metrics.jsonl").write_text("damaged\n")
        tab.until("document.body.innerText.includes('metrics.jsonl:1: not JSON')")
        assert tab.evaluate(CHARTS) > 0  # what was read before is still there
