"""How fast `treepo view` opens a file of trees, and how smoothly its list scrolls.

    python -m benchmarks.view [--trees 10000] [--segment-tokens 128] [--file trees.jsonl]

Without --file, writes trees of 16 leaves to a temporary folder. `first_rows` is when the first trees can be
shown, `all_rows` when all of them are listed; the second opening finds the index of the first. With Chromium,
also the page itself: from its address to its list, and the frames of a list that scrolls for two seconds. One
JSON line each; times in seconds, `cpu` those of the processor until all trees are listed.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tests.support.browser import CHROMIUM, Tab, browser
from treepo.data.daemon_thread import in_thread
from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree, Verdict, to_json
from treepo.view.bundle import live_page
from treepo.view.parts import open_parts
from treepo.view.server import serving
from treepo.view.sources import find_sources
from treepo.view.trees import trees_part

LEAVES, TREES_A_STEP, DISTINCT = 16, 64, 100
_ENDS = (
    (Stop.BOXED, Verdict.CORRECT, 1.0),
    (Stop.EOS, Verdict.WRONG, -1.0),
    (Stop.LIMIT, Verdict.NO_ANSWER, -1.0),
)
_LISTED = "document.querySelector('#trees [role=status]')?.textContent"
_SCROLL = """new Promise((done) => {
  const box = document.querySelector("#trees .list"), times = [];
  const frame = (time) => {
    times.push(time);
    box.scrollTop += 300;
    if (time - times[0] < 2000) requestAnimationFrame(frame);
    else done(times.slice(1).map((one, at) => one - times[at]));
  };
  requestAnimationFrame(frame);
})"""


def random_tree(rng: np.random.Generator, segment_tokens: int) -> Tree:
    """A tree of 16 leaves that branches in two at random segments."""
    segments: list[Segment] = []
    leaves: list[Leaf] = []

    def grow(parent: int, width: int) -> None:
        tokens = rng.integers(
            0, 50_000, rng.integers(segment_tokens // 2, segment_tokens + 1), dtype=np.int32
        )
        log_probs = -rng.exponential(0.4, len(tokens)).astype(np.float32)
        segments.append(Segment(parent, tokens, log_probs, np.zeros_like(tokens), Finish.LENGTH))
        here = len(segments) - 1
        if width > 1:
            left = int(rng.integers(1, width))
            grow(here, left)
            grow(here, width - left)
        else:
            stop, verdict, reward = _ENDS[int(rng.integers(len(_ENDS)))]
            leaves.append(Leaf(here, stop, reward, verdict))

    grow(PROMPT, LEAVES)
    return Tree("train:0", rng.integers(0, 50_000, 150, dtype=np.int32), tuple(segments), tuple(leaves))


def write_trees(path: Path, trees: int, segment_tokens: int) -> None:
    """Write so many trees, of which a hundred differ in more than their step, prompt and id."""
    rng = np.random.default_rng(0)
    records = [orjson.loads(to_json(random_tree(rng, segment_tokens))) for _ in range(DISTINCT)]
    with path.open("wb") as file:
        for number in range(trees):
            record = records[number % DISTINCT]
            own = {"prompt_id": f"train:{number}", "step": number // TREES_A_STEP + 1, "answer": str(number)}
            own["prompt"] = [number % 50_000, *record["prompt"]]
            file.write(orjson.dumps(record | own, option=orjson.OPT_APPEND_NEWLINE))


def answers(path: Path) -> dict[str, float]:
    """Seconds of the answers that the page asks for."""
    ask = trees_part(find_sources([path])).answers
    started, cpu_started, times = time.perf_counter(), time.process_time(), {}
    query, more = {"source": "0", "from": "0", "mark": ""}, True
    while more:
        answer: Any = ask["rows"](query)
        query |= {"from": str(answer["start"] + len(answer["columns"]["step"])), "mark": answer["mark"]}
        more = answer["more"]
        times.setdefault("first_rows", time.perf_counter() - started)
    times |= {"all_rows": time.perf_counter() - started, "cpu": time.process_time() - cpu_started}
    for name in ("tree", "text"):
        started = time.perf_counter()
        ask[name]({"source": "0", "tree": "7", "node": "1", "from": "0"})
        times[name] = time.perf_counter() - started
    return times


async def page(path: Path, trees: int) -> dict[str, float]:
    """Seconds until the page lists trees and all trees, and the frames of its list."""
    sources = find_sources([path])
    parts = open_parts(sources)
    async with serving(live_page(sources, parts), parts) as address:
        return await in_thread(lambda: _look(address, trees))


def _look(address: str, trees: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        started = time.perf_counter()
        tab.call("Page.navigate", url=f"{address}#trees")
        first = _seconds_until(tab, started, lambda text: text[0] in "123456789")
        last = _seconds_until(tab, started, lambda text: text == f"{trees:,} of {trees:,} trees")
        frames = tab.evaluate(_SCROLL)
    return {
        "first_rows": first,
        "all_rows": last,
        "frames_per_second": 1000 * len(frames) / sum(frames),
        "longest_frame": max(frames) / 1000,
    }


def _seconds_until(tab: Tab, started: float, holds: Callable[[str], bool]) -> float:
    while not holds(tab.evaluate(_LISTED) or "0 "):
        time.sleep(0.01)
    return time.perf_counter() - started


def report(what: str, path: Path, times: dict[str, float]) -> None:
    rounded = {name: round(value, 3) for name, value in times.items()}
    print(json.dumps({"what": what, "megabytes": round(path.stat().st_size / 1e6), **rounded}), flush=True)  # noqa: T201 - the result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trees", type=int, default=10_000)
    parser.add_argument("--segment-tokens", type=int, default=128)
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "trees.jsonl"
        if options.file is None:
            write_trees(path, options.trees, options.segment_tokens)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/answers"
        for opening in ("first", "second"):
            report(f"{opening} opening", path, answers(path))
        os.environ["XDG_CACHE_HOME"] = f"{folder}/page"
        for opening in ("first", "second") if CHROMIUM is not None else ():
            report(f"page, {opening} opening", path, asyncio.run(page(path, options.trees)))


if __name__ == "__main__":
    main()
