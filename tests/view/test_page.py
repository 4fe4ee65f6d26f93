"""The page as one file: its policy, its scripts, and what an exported one has in it."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.paths import ROOT
from tests.support.run_folders import LOG, write_run_folder
from treepo.cli.main import app
from treepo.view.bundle import exported_page, live_page
from treepo.view.parts import open_parts
from treepo.view.sources import find_sources

SCRIPTS = sorted((ROOT / "treepo/view/page").glob("*.js"))
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"


class Elements(HTMLParser):
    """The page's elements by tag, and the content of scripts and style sheets."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {"script": [], "style": [], "json": []}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "json" if dict(attrs).get("type") == "application/json" else tag

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.contents:
            self.contents[self._inside].append(data)

    def policy(self) -> str:
        (policy,) = (
            attributes["content"]
            for tag, attributes in self.tags
            if attributes.get("http-equiv") and tag == "meta"
        )
        return policy or ""


def pages(folder: Path) -> list[str]:
    sources = find_sources([folder])
    parts = open_parts(sources)
    return [live_page(sources, parts), exported_page(sources, parts)]


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    name = HOSTILE.replace("/", "_")
    config = f"reward:\n  function: {json.dumps(HOSTILE)}\n"
    return write_run_folder(tmp_path / name, config=config, log=LOG.replace("it died", HOSTILE))


def test_the_policy_names_the_hash_of_each_script_and_style_sheet_and_nothing_else(hostile_run: Path) -> None:
    for page in pages(hostile_run):
        elements = Elements(page)
        hashes = {
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for kind in ("script", "style")
            for text in elements.contents[kind]
        }
        policy = elements.policy()
        assert set(re.findall(r"'sha256-[^']+'", policy)) == hashes
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy


def test_an_exported_page_may_ask_nobody_and_a_live_one_its_server(tmp_path: Path) -> None:
    live, exported = pages(write_run_folder(tmp_path / "run"))
    assert "connect-src 'self';" in Elements(live).policy()
    assert "connect-src 'none';" in Elements(exported).policy()


def test_hostile_names_and_texts_are_no_markup(hostile_run: Path) -> None:
    for page in pages(hostile_run):
        elements = Elements(page)
        assert {tag for tag, _ in elements.tags} <= {
            *(
                "html",
                "head",
                "meta",
                "title",
                "style",
                "body",
                "header",
                "b",
                "div",
                "main",
                "noscript",
                "script",
            )
        }
        assert not any("hit = 1" in text for text in elements.contents["script"])


def test_an_exported_page_answers_every_question_of_each_run(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run")
    data = json.loads(Elements(pages(run)[1]).contents["json"][0])
    parts = {part.name: part for part in open_parts(find_sources([run]))}
    asked = {question for question, _, _ in data["answers"]}
    assert {f"run/{question}" for question in parts["run"].answers} <= asked
    answers = {question: answer for question, _, answer in data["answers"]}
    assert answers["run/metrics"]["steps"] == [1, 2]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_our_scripts_make_no_markup_of_text_and_run_none(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc|DOMParser"
    assert not re.search(forbidden, text)
    assert text.startswith('"use strict";\n//')


def test_each_vendored_library_has_its_licence() -> None:
    folder = ROOT / "treepo/view/vendor"
    for file in folder.iterdir():
        if file.suffix in (".js", ".css"):
            assert (folder / f"{file.name.split('.')[0]}.LICENSE").read_text()


def test_the_command_writes_a_page_that_opens_offline(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["view", str(write_run_folder(tmp_path / "run")), "--export", str(page)])
    assert result.exit_code == 0
    assert "connect-src 'none'" in Elements(page.read_text(encoding="utf-8")).policy()
