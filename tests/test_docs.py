"""The links, keys, paths and messages that the documentation names exist, and its figures are current."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from tests.support.paths import ROOT
from treepo.config.base import section_in
from treepo.config.reference import COMMANDS, render

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
SOURCES = ("treepo", "sglang_rollout", "megatron_bridge")


def prose(page: Path) -> str:
    """The page without its blocks of code, whose links nobody follows."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def build(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does. Not quietly: strict mode ignores warnings that are not printed."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # about the theme's future
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)


@cache
def built(folder: Path) -> Path:
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site. MkDocs has found no broken link, no missing anchor and no page without a place."""
    return built(tmp_path_factory.getbasetemp() / "site")


def test_the_site_needs_no_other_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in DOCS.glob("[a-z]*.md")}
    for page in pages:
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert not [tag for tag in tags if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)], page


def test_the_site_refuses_broken_links(tmp_path: Path) -> None:
    broken = ("none.md", "README.md#none", "../README.md")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "install.md").open("a", encoding="utf-8") as page:
        page.writelines(f"\n[a link]({link})\n" for link in broken)
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    warnings = [line for line in result.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == len(broken)
    for link in broken:
        assert any(f"'{link}'" in line for line in warnings), link


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "algorithm.html").read_text(encoding="utf-8")
    assert page.count("<math") == len(re.findall(r"^\$\$", prose(DOCS / "algorithm.md"), flags=re.MULTILINE))
    assert "$$" not in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_in_the_repository_too(page: Path) -> None:
    for link in links(page):
        target = urlsplit(link)
        if target.scheme:
            assert (target.scheme, bool(target.hostname)) == ("https", True), link
            continue
        file = (page.parent / target.path).resolve() if target.path else page
        assert file.exists(), link
        assert file.is_relative_to(DOCS if page.parent == DOCS else ROOT), link
        if target.fragment:
            assert target.fragment in anchors(file), link


@cache
def definitions(folder: Path) -> set[str]:
    """Names of modules, classes, functions and module-level variables below a folder."""
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        found.add(file.stem)
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r"^\s*(?:async def|def|class) (\w+)", text, flags=re.MULTILINE))
        found |= set(re.findall(r"^(\w+)(?:: .+)? = ", text, flags=re.MULTILINE))
    return found


def test_the_ways_through_the_system_name_what_the_packages_define() -> None:
    """A cell of the last column: `package`: `Class.method`, `function`; the next package."""
    rows = re.findall(r"^\| \d+ .+ \| (.+) \|$", prose(DOCS / "architecture.md"), flags=re.MULTILINE)
    assert len(rows) > 20
    for package, names in re.findall(r"`([\w.]+)`(?:: ((?:`[\w.]+`(?:, )?)+))?", "; ".join(rows)):
        known = definitions(ROOT / package.replace(".", "/"))
        for name in re.findall(r"[\w.]+", names):
            assert set(name.split(".")) <= known, f"{package}: {name}"


def test_named_tests_exist() -> None:
    known = definitions(ROOT / "tests")
    pages = [page for page in PAGES if page.name != "from_treepo.md"]  # there some official flags begin so
    names = {name for page in pages for name in re.findall(r"`(test_\w+)(?:\.py)?`", page.read_text("utf-8"))}
    assert len(names) > 20
    assert names <= known, names - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path) -> None:
    """A name is `folder/file` in one of the repository's own folders; a star makes it a pattern."""
    folders = "|".join((*SOURCES, "examples", "tests", "benchmarks", "docs"))
    for name in re.findall(rf"`((?:{folders})/[\w./*-]*)`", page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(name.rstrip("/"))), name


@pytest.mark.parametrize("figure", sorted(DOCS.rglob("*.svg")), ids=lambda figure: figure.stem)
def test_figures_are_whole_and_need_no_server(figure: Path) -> None:
    text = figure.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.get("viewBox"), "an image without it does not scale"
    assert not re.search(r"(?:href|src)=|url\(\s*[\"']?\w|@import|<script", text)


def test_the_tree_figure_is_current() -> None:
    drawn = runpy.run_path(str(DOCS / "figures" / "make.py"))["tree_figure"]()
    message = "run: python docs/figures/make.py"
    assert (DOCS / "figures" / "tree.svg").read_text(encoding="utf-8") == drawn, message


@pytest.mark.parametrize(
    ("figure", "name"), [("learning.svg", "quickstart.md"), ("smollm2.svg", "smollm2.md")]
)
def test_the_pages_quote_the_run_that_the_figures_show(figure: str, name: str) -> None:
    label = ElementTree.parse(DOCS / "figures" / figure).getroot().get("aria-label") or ""
    (accuracies,) = re.findall(r"from [\d.]+ to [\d.]+", label)
    for page in (ROOT / "README.md", DOCS / name):
        assert accuracies in page.read_text(encoding="utf-8"), page


def test_the_reference_is_current() -> None:
    message = "run: python -m treepo.config.reference docs/configuration.md"
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == render(), message


def sections(schema: type[BaseModel]) -> set[type[BaseModel]]:
    found = {schema}
    for field in schema.model_fields.values():
        if (section := section_in(field.annotation)) is not None:
            found |= sections(section)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_has_every_key(command: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .* \| (.+) \|$", render(), flags=re.MULTILINE)
    described = {(key, meaning.replace("&#124;", "|")) for key, meaning in rows}
    for section in sections(COMMANDS[command]):
        for key, field in section.model_fields.items():
            assert (key, " ".join((field.description or "").split())) in described, f"{section}.{key}"


def resolves(dotted: str) -> bool:
    section: type[BaseModel] | None = COMMANDS["train"]
    for part in dotted.split("."):
        if section is None or part not in section.model_fields:
            return False
        annotation = section.model_fields[part].annotation
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return True


def test_the_keys_in_the_official_recipes_tables_exist() -> None:
    top = COMMANDS["train"].model_fields
    cells = [
        row.split(" | ")[2] for row in prose(DOCS / "from_treepo.md").splitlines() if row.count(" | ") == 4
    ]
    keys = [key for cell in cells for key in re.findall(r"`([a-z_.]+)", cell) if key.split(".")[0] in top]
    assert len(keys) > 40
    assert not [key for key in keys if not resolves(key)]


def test_the_commands_that_join_the_papers_data_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "TreePO_data" / "data"
    folder.mkdir(parents=True)
    # The types of columns differ between the published files: an answer is a string or a list.
    for name, answer in (
        ("SimpleRL-simplelr_qwen_level3to5.train", "1"),
        ("DeepScaler.train", ["1", "2"]),
        ("DeepScaler.aime", "3"),
    ):
        row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": answer}}
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{name}.parquet")
    (code,) = re.findall(
        r"```python\n(.*?)```", (DOCS / "from_treepo.md").read_text(encoding="utf-8"), re.DOTALL
    )
    exec(compile(code, "from_treepo.md", "exec"), {})
    rows = [
        json.loads(line) for line in (tmp_path / "data" / "treepo" / "train.jsonl").read_text().splitlines()
    ]
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["1", ["1", "2"]]
    assert (tmp_path / "data" / "treepo" / "aime.jsonl").is_file()


@cache
def messages() -> str:
    """All source code, with adjacent strings joined and every filled-in value an ellipsis."""
    files = [file for name in SOURCES for file in sorted((ROOT / name).rglob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    text = re.sub(r"\"\s*\n\s*f?\"|\" \\\n\s*\"", "", text)
    text = re.sub(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|%[.\d]*[sdrg]", "…", text)
    return text + (ROOT / "setup.sh").read_text(encoding="utf-8")


def test_quoted_messages_are_what_the_code_says() -> None:
    headings = re.findall(
        r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(headings) > 20
    for heading in headings:
        for part in heading.split("…"):
            assert part.strip() in messages(), heading
