"""The tab "Trees" in a real browser: hostile texts, keys, a list of many trees, a run that goes on."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orjson
import pytest

from tests.support.browser import CHROMIUM, Tab, browser
from tests.support.small_trees import tree_of
from tests.view.test_trees import TOKENIZER, run_of, with_texts
from treepo.tree import Tree, to_json
from treepo.view.bundle import exported_page, live_page
from treepo.view.parts import open_parts
from treepo.view.server import serving
from treepo.view.sources import find_sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
]

ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "</script><svg onload='window.hit = 1'>",
    "]]><style>* { display: none }</style>",
    "javascript:window.hit = 1",
]
INVISIBLE = "left \u202eright\u2066 \u200b \x07 \x1b[31m end"
INVISIBLE_SHOWN = "left ⟨U+202E⟩right⟨U+2066⟩ ⟨U+200B⟩ ⟨U+0007⟩ ⟨U+001B⟩[31m end"
ROWS = "document.querySelectorAll('#trees [role=option]')"
SUMMARY = "document.querySelector('#trees [role=status]').textContent"
TEXT = "document.querySelector('#trees .text').textContent"
CHOSEN = "document.querySelector('#trees section.chosen h3')?.textContent"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        tab.look(width=1280)
        yield tab


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the page of a run from another thread, as `treepo view` does; yields its address."""
    ready, done = threading.Event(), threading.Event()
    addresses = []

    async def serve() -> None:
        sources = find_sources([folder])
        parts = open_parts(sources)
        async with serving(live_page(sources, parts), parts) as address:
            addresses.append(address)
            ready.set()
            while not done.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield addresses[0]
    finally:
        done.set()
        thread.join(60)


def exported(folder: Path, place: str) -> str:
    sources = find_sources([folder])
    path = folder / "page.html"
    path.write_text(exported_page(sources, open_parts(sources)), encoding="utf-8")
    return f"{path.as_uri()}#trees/{place}"


def worded(text: str, parents: tuple[int, ...] = (-1, 0, 0)) -> Tree:
    """A tree whose prompt and segments all say this."""
    leaves = len(set(range(len(parents))) - set(parents))
    tree = tree_of(parents, [float(leaf % 2) for leaf in range(leaves)])
    return with_texts(tree, text, [text.encode()] * len(parents))


def model_in(folder: Path) -> dict[str, str]:
    TOKENIZER.hugging_face.save_pretrained(folder / "model")
    return {"path": str(folder / "model")}


def test_hostile_texts_are_only_text(tab: Tab, tmp_path: Path) -> None:
    everything = " ".join([*ATTACKS, INVISIBLE])
    record = orjson.loads(to_json(worded(everything), step=1, answer=everything, answers=[everything] * 2))
    record["prompt_id"] = everything
    record["leaves"][0] |= {"texts": {everything: everything}, "numbers": {everything: 1}}
    lines = [
        orjson.dumps(record) + b"\n",
        b'{"prompt_id": "<script>window.hit = 1</script>"}\n',
        b"<script>\n",
    ]
    folder = run_of(tmp_path / "run", lines, model=model_in(tmp_path))
    tab.open(exported(folder, "0/0/2"))
    tab.until(f"{CHOSEN}?.startsWith('Segment 2')")
    shown = tab.evaluate("document.querySelector('#trees').textContent")
    for attack in ATTACKS:
        assert shown.count(attack) >= 6  # id, gold answer, texts, the list
    assert INVISIBLE_SHOWN in shown
    assert tab.evaluate("window.hit") is None
    assert (
        tab.evaluate("document.querySelectorAll('#trees :is(script, img, iframe, link, style, a)').length")
        == 0
    )
    assert "line 3: not a tree" in shown
    assert tab.faults() == []


def test_a_long_segment_comes_in_pieces(tab: Tab, tmp_path: Path) -> None:
    tree = with_texts(tree_of([-1], [1.0]), "Why?", [b"0123456789" * 20_000])
    folder = run_of(tmp_path / "run", [to_json(tree, step=1)], model=model_in(tmp_path))
    with served(folder) as address:
        tab.open(f"{address}#trees/0/0/1")
        button = "document.querySelector('#trees .tokens button')"
        tab.until(f"{button}?.textContent === 'more (4,000 of 200,000 tokens are shown)'")
        tab.evaluate(f"{button}.click()")
        tab.until(f"{button}?.textContent === 'more (8,000 of 200,000 tokens are shown)'")
        assert tab.evaluate(
            "document.querySelector('#trees section.chosen .tokens').textContent.slice(0, 8000)"
        ) == ("0123456789" * 800)
    assert tab.faults() == []


def test_keys_choose_trees_and_segments(tab: Tab, tmp_path: Path) -> None:
    lines = [to_json(worded(f"problem {number}"), step=1) for number in range(5)]
    folder = run_of(tmp_path / "run", lines, model=model_in(tmp_path))
    tab.open(exported(folder, ""))
    tab.until(f"{ROWS}.length === 5")
    tab.evaluate("document.querySelector('#trees .list').focus()")
    tab.press("ArrowDown")
    tab.until(f"{TEXT}.includes('problem 0')")
    tab.press("End")
    tab.until(f"{TEXT}.includes('problem 4')")
    tab.evaluate("document.querySelector('#trees rect[tabindex=\"0\"]').focus()")
    for key, segment in (
        ("ArrowRight", 2),
        ("ArrowDown", 3),
        ("ArrowUp", 2),
        ("ArrowLeft", 1),
        ("ArrowLeft", 0),
    ):
        tab.press(key)
        tab.until(f"{CHOSEN}?.startsWith('{f'Segment {segment} ' if segment else 'Prompt'}')")
        assert tab.evaluate("document.activeElement.tagName") == "rect"
    assert tab.faults() == []


def choose(tab: Tab, label: str, value: str) -> None:
    """Choose an option, or write into a field, as a person does."""
    tab.evaluate(
        f"""(() => {{
          const field = document.querySelector('#trees [aria-label^="{label}"]');
          field.value = "{value}";
          for (const name of ["input", "change"]) field.dispatchEvent(new Event(name, {{ bubbles: true }}));
        }})()"""
    )


def test_trees_are_found_and_sorted(tab: Tab, tmp_path: Path) -> None:
    rewards = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    trees = [tree_of([-1, -1], rewards[number % 3], [1, 1 + number]) for number in range(9)]
    named = [
        with_texts(tree, f"problem {number}", [b"a", b"b" * (1 + number)])
        for number, tree in enumerate(trees)
    ]
    lines = [to_json(tree, step=number // 3 + 1, answer="7") for number, tree in enumerate(named)]
    tab.open(exported(run_of(tmp_path / "run", lines, model=model_in(tmp_path)), ""))
    tab.until(f"{ROWS}.length === 9 && {ROWS}[0].textContent.startsWith('problem')")

    def listed() -> list[int]:
        return tab.evaluate(f"[...{ROWS}].map((row) => Number(row.textContent.match(/problem (.)/)[1]))")

    assert listed() == list(range(9))
    choose(tab, "Order", "disagreement")
    assert listed() == [1, 4, 7, 0, 2, 3, 5, 6, 8]
    choose(tab, "Order", "tokens")
    choose(tab, "Step", "2")
    assert listed() == [5, 4, 3]
    assert tab.evaluate(SUMMARY) == "3 of 9 trees"
    choose(tab, "Search", "PROBLEM 4")
    assert listed() == [4]
    choose(tab, "Step", "")
    choose(tab, "Search", "nothing")
    assert listed() == []
    assert tab.faults() == []


def test_ten_thousand_trees_are_few_elements(tab: Tab, tmp_path: Path) -> None:
    line = to_json(tree_of([-1, -1], [1.0, 0.0]), step=1)
    folder = run_of(tmp_path / "run", [line] * 10_000)
    with served(folder) as address:
        tab.open(f"{address}#trees")
        tab.until(f"{SUMMARY} === '10,000 of 10,000 trees'")
        assert 10 < tab.evaluate(f"{ROWS}.length") < 60
        tab.evaluate("document.querySelector('#trees .list').scrollTop = 1e9")
        tab.until(f"[...{ROWS}].at(-1).id === 'tree-9999'")
        assert tab.evaluate(f"{ROWS}.length") < 60
        with (folder / "trees.jsonl").open("ab") as file:  # the run goes on
            file.write(line)
        tab.until(f"{SUMMARY} === '10,001 of 10,001 trees'")
        (folder / "trees.jsonl").write_bytes(line * 3)  # and back to a checkpoint
        tab.until(f"{SUMMARY} === '3 of 3 trees'")
    assert tab.faults() == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(tab: Tab, tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(0)
    parents = [-1, *(int(rng.integers(index)) for index in range(1, 40))]
    words = "".join(rng.choice(list("abc "), 50)) + "x" * 400
    folder = run_of(
        tmp_path / "run", [to_json(worded(words, tuple(parents)), step=1)], model=model_in(tmp_path)
    )
    tab.look(width=width)
    tab.open(exported(folder, "0/0/7"))
    tab.until(f"{CHOSEN}?.startsWith('Segment 7')")
    for mode in ("reward", "advantage", "log_prob", "version"):
        choose(tab, "Colour", mode)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.faults() == []
