"""The index of a file of trees: its summaries, and that it follows whatever happens to the file."""

import dataclasses
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest

from tests.support.random_trees import random_tree
from treepo.errors import DataError
from treepo.tree import PROMPT, Finish, Tree, Verdict, to_json
from treepo.view import trees_index
from treepo.view.trees_index import NO_STEP, NOT_A_TREE, VERDICTS, TreesIndex


def varied_tree(rng: np.random.Generator) -> Tree:
    """A random tree with any verdicts, cuts, and leaves that have no grade."""
    tree = random_tree(rng, f"p:{rng.integers(5)}")
    verdicts = [(None, None), (None, Verdict.TIMEOUT), (1.0, Verdict.CORRECT), (-0.5, Verdict.WRONG)]
    segments = tuple(
        dataclasses.replace(segment, finish=Finish.CUT if rng.random() < 0.3 else Finish.LENGTH)
        for segment in tree.segments
    )
    leaves = tuple(
        dataclasses.replace(leaf, reward=reward, verdict=verdict)
        for leaf in tree.leaves
        for reward, verdict in [verdicts[rng.integers(len(verdicts))]]
    )
    return dataclasses.replace(tree, segments=segments, leaves=leaves)


def lines_of(seed: int, trees: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [to_json(varied_tree(rng), step=seed, answer=str(number)) for number in range(trees)]


def opened(path: Path, **settings: Path) -> TreesIndex:
    index = TreesIndex(path, **settings)
    assert index.update(60.0)
    return index


def same(index: TreesIndex, path: Path) -> bool:
    """Whether an index tells what a new one of the file tells."""
    new = TreesIndex(path, cache=path.parent / "no cache")
    new.update(60.0)
    rows = [[index.prompts[row["prompt"]].id if row["prompt"] >= 0 else "", row] for row in index.rows]
    expected = [[new.prompts[row["prompt"]].id if row["prompt"] >= 0 else "", row] for row in new.rows]
    names = [name for name in trees_index.ROW.names or () if name != "prompt"]
    return index.faults == new.faults and [
        [prompt, *(str(row[name]) for name in names)] for prompt, row in rows
    ] == [[prompt, *(str(row[name]) for name in names)] for prompt, row in expected]


def values_below(tree: Tree) -> list[list[float]]:
    """For each node, the mean rewards of its children with a graded leaf below."""

    def rewards(node: int) -> list[float]:
        own = [leaf.reward for leaf in tree.leaves if leaf.segment == node and leaf.reward is not None]
        return own + [reward for child in children(node) for reward in rewards(child)]

    def children(node: int) -> list[int]:
        return [index for index, segment in enumerate(tree.segments) if segment.parent == node]

    nodes = range(PROMPT, len(tree.segments))
    return [[fmean(rewards(child)) for child in children(node) if rewards(child)] for node in nodes]


def test_a_row_sums_its_tree_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trees = [varied_tree(rng) for _ in range(40)]
    path = tmp_path / "trees.jsonl"
    path.write_bytes(b"".join(to_json(tree, step=number) for number, tree in enumerate(trees)))
    index = opened(path)
    assert len(index.rows) == len(trees)
    for number, (row, tree) in enumerate(zip(index.rows, trees, strict=True)):
        assert row["step"] == number
        assert row["unique_tokens"] == tree.unique_tokens()
        assert row["total_tokens"] == tree.total_tokens()
        assert row["cuts"] == sum(segment.finish is Finish.CUT for segment in tree.segments)
        assert row["version"] == max(segment.versions.max() for segment in tree.segments)
        verdicts = [leaf.verdict for leaf in tree.leaves]
        assert row["verdicts"].tolist() == [verdicts.count(verdict) for verdict in VERDICTS]
        rewards = [leaf.reward for leaf in tree.leaves if leaf.reward is not None]
        assert row["reward"] == pytest.approx(fmean(rewards) if rewards else np.nan, nan_ok=True)
        spreads = [pstdev(values) for values in values_below(tree) if len(values) > 1]
        assert row["disagreement"] == pytest.approx(fmean(spreads) if spreads else 0.0)
        prompt = index.prompts[row["prompt"]]
        assert (prompt.id, prompt.tokens.tobytes()) == (tree.prompt_id, tree.prompt.tobytes())
        assert index.tree(number)[1].prompt.tobytes() == tree.prompt.tobytes()


def test_the_index_follows_a_file_that_grows_and_is_cut_back_anywhere(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "trees.jsonl"
    index = TreesIndex(path)
    assert index.update(60.0)  # there is no file yet
    assert len(index.rows) == 0
    written = b""
    for turn in range(60):
        more = b"".join(lines_of(turn, 3))
        kept = written[: rng.integers(len(written) + 1)] if rng.random() < 0.3 else written
        kept = kept[: kept.rfind(b"\n") + 1] if rng.random() < 0.5 else kept  # as a resumed run leaves it
        written = kept + more[: rng.integers(len(more) + 1)]
        path.write_bytes(written)
        assert index.update(60.0)
        assert index.end == written.rfind(b"\n") + 1
        assert same(index, path)
    path.unlink()
    assert index.update(60.0)
    assert len(index.rows) == 0


def test_what_is_not_a_tree_keeps_its_line_and_has_a_reason(tmp_path: Path) -> None:
    good = lines_of(1, 1)[0]
    bad = {
        b"": "not a tree",
        b"null": "not a tree",
        b"[]": "not a tree",
        b"{}": "missing required field `prompt_id`",
        b"[" * 100_000: "not a tree",
        good.replace(b'"p:', b'"\\ud800p:', 1): "surrogate",
        good.replace(b'"p:', b'"\xffp:', 1): "utf-8",
        good.replace(b'"tokens":', b'"tokens":7,"x":', 1): "a segment has the tokens 7",
        good[: len(good) // 2]: "not a tree",
        good.replace(b'"parent":-1', b'"parent":7', 1): "segment 0 has parent 7",
        good.replace(b'"parent":-1', b'"parent":-9', 1): "segment 0 has parent -9",
        good.replace(b'"step":1', b'"step":4294967296', 1): "4294967296",
        good.replace(b'"step":1', b'"step":"1"', 1): "not a tree",
        good.replace(b'"prompt":[', b'"prompt":["a",', 1): "not a tree",
        good.replace(b'"prompt":[', b'"prompt":[[1],', 1): "not a tree",
        good.replace(b'"prompt":[', b'"prompt":[99999999999,', 1): "not a tree",
        good.replace(b'"leaves":[', b'"leaves":[{"segment":-1,"reward":1,"verdict":null},', 1): "segment -1",
        good.replace(b'"verdict":', b'"verdict":[],"x":', 1): "not a tree",
        good.replace(b'"verdict":', b'"verdict":"great","x":', 1): "'great'",
    }
    path = tmp_path / "trees.jsonl"
    path.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" + good for line in bad))
    index = opened(path)
    assert index.rows["prompt"][::2].tolist() == [NOT_A_TREE] * len(bad)
    assert (index.rows["prompt"][1::2] != NOT_A_TREE).all()
    assert sorted(index.faults) == list(range(0, 2 * len(bad), 2))
    for reason, part in zip(index.faults.values(), bad.values(), strict=True):
        assert reason.startswith("not a tree: ")
        assert part in reason
    with pytest.raises(DataError, match=r"trees\.jsonl:3: not a tree"):
        index.tree(2)
    with pytest.raises(DataError, match=rf"there is no such tree; the file has {2 * len(bad)}"):
        index.tree(2 * len(bad))


def test_a_tree_without_step_and_answer(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    path.write_bytes(to_json(varied_tree(np.random.default_rng(0))))
    index = opened(path)
    assert index.rows["step"].tolist() == [NO_STEP]
    assert index.prompts[0].answer == ""


def test_an_update_ends_in_time_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    path.write_bytes(b"".join(lines_of(1, 5)))
    index = TreesIndex(path)
    assert [index.update(0.0) for _ in range(6)] == [False] * 5 + [True]
    assert same(index, path)


def test_the_index_of_a_large_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees_index, "_CACHED_BYTES", 1)
    path, cache = tmp_path / "trees.jsonl", tmp_path / "cache"
    path.write_bytes(b"".join([*lines_of(1, 4), b"null\n", *lines_of(2, 4)]))
    opened(path, cache=cache)
    assert len(list(cache.iterdir())) == 1
    kept = TreesIndex(path, cache)
    assert len(kept.rows) == 9  # before it reads the file
    assert same(kept, path)
    path.write_bytes(b"".join([*lines_of(1, 3), *lines_of(3, 9)]))  # cut back, and written on
    assert kept.update(60.0)
    assert same(kept, path)
    assert same(opened(path, cache=cache), path)


def test_a_kept_index_that_is_damaged_or_foreign_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trees_index, "_CACHED_BYTES", 1)
    path, cache = tmp_path / "trees.jsonl", tmp_path / "cache"
    path.write_bytes(b"".join(lines_of(1, 4)))
    opened(path, cache=cache)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    np.savez(kept, rows=np.zeros(3))
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"\0" * len(whole), kept.read_bytes()):
        caplog.clear()
        kept.write_bytes(damaged)
        assert same(opened(path, cache=cache), path)
        assert "the index is built again" in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trees_index, "_CACHED_BYTES", 1)
    path, cache = tmp_path / "trees.jsonl", tmp_path / "cache"
    path.write_bytes(b"".join(lines_of(1, 4)))
    cache.write_text("a file, not a folder")
    index = opened(path, cache=cache)
    assert index.update(60.0)
    assert len(index.rows) == 4
    assert caplog.text.count("not written") == 1
