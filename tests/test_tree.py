"""The tree: its invariants, its counts against the leaves one by one, its line of JSON."""

from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.random_trees import random_tree, with_routes
from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree, Verdict, from_json, to_json


def _segment(parent: int, *tokens: int) -> Segment:
    zeros = np.zeros(len(tokens), np.int32)
    return Segment(parent, np.array(tokens, np.int32), zeros.astype(np.float32), zeros, Finish.LENGTH)


def _tree(segments: list[Segment], leaves: list[int]) -> Tree:
    return Tree("p", np.array([7], np.int32), tuple(segments), tuple(Leaf(at, Stop.EOS) for at in leaves))


def test_the_worked_example() -> None:
    tree = _tree(
        [_segment(PROMPT, 1, 2), _segment(0, 3), _segment(0, 4), _segment(2, 5), _segment(2, 6)], [1, 3, 4]
    )
    assert tree.path(4) == [0, 2, 4]
    assert tree.response(tree.leaves[2]).tolist() == [1, 2, 4, 6]
    assert (tree.unique_tokens(), tree.total_tokens()) == (6, 3 + 4 + 4)


@pytest.mark.parametrize(
    ("segments", "leaves", "message"),
    [
        ([_segment(0, 1)], [0], "segment 0 has parent 0"),
        ([_segment(1, 1), _segment(PROMPT, 1)], [0], "segment 0 has parent 1"),
        ([_segment(PROMPT)], [0], "segment 0 has 0 tokens"),
        (
            [replace(_segment(PROMPT, 1, 2), log_probs=np.zeros(1, np.float32))],
            [0],
            "2 tokens, 1 log-probs and 2 versions",
        ),
        (
            [replace(_segment(PROMPT, 1, 2), versions=np.zeros(3, np.int32))],
            [0],
            "2 tokens, 2 log-probs and 3 versions",
        ),
        ([_segment(PROMPT, 1), _segment(0, 2)], [0, 1], "not exactly its childless"),
        ([_segment(PROMPT, 1), _segment(PROMPT, 2)], [0], "not exactly its childless"),
        ([_segment(PROMPT, 1)], [0, 0], "not exactly its childless"),
    ],
)
def test_parts_of_no_tree_are_refused(segments: list[Segment], leaves: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tree(segments, leaves)


@pytest.mark.parametrize("seed", range(20))
def test_counts_agree_with_the_leaves_one_by_one(seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed))
    responses = [tree.response(leaf) for leaf in tree.leaves]
    assert tree.total_tokens() == sum(map(len, responses))
    assert tree.unique_tokens() <= tree.total_tokens()


@pytest.mark.parametrize("seed", range(20))
def test_one_line_of_json_gives_the_tree_back(seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed))
    tree = tree.graded([(None, Verdict.TIMEOUT), *[(0.5, Verdict.WRONG)] * (len(tree.leaves) - 1)])
    line = to_json(tree, step=3)
    back = from_json(line)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert back.leaves == tree.leaves
    assert back.prompt.tolist() == tree.prompt.tolist()
    for ours, theirs in zip(tree.segments, back.segments, strict=True):
        assert (ours.parent, ours.finish) == (theirs.parent, theirs.finish)
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.versions, theirs.versions, strict=True)
        np.testing.assert_array_equal(ours.log_probs, theirs.log_probs)  # bit for bit, through decimal text


def test_draws_are_written_where_they_are_not_one() -> None:
    tree = _tree([_segment(PROMPT, 1), replace(_segment(PROMPT, 2), draws=3)], [0, 1])
    record = orjson.loads(to_json(tree))
    assert [segment.get("draws") for segment in record["segments"]] == [None, 3]
    assert [segment.draws for segment in from_json(to_json(tree)).segments] == [1, 3]
    with pytest.raises(ValueError, match="segment 1 has 0 draws"):
        replace(tree, segments=(tree.segments[0], replace(tree.segments[1], draws=0)))
    for draws in (0, -1, 2**31, 1.0, True, None, "2", [2]):
        record["segments"][1]["draws"] = draws
        with pytest.raises(ValueError, match="draws"):
            from_json(orjson.dumps(record))


def _of_versions(versions: list[int]) -> Tree:
    tree = _tree([_segment(PROMPT, *range(len(versions)))], [0])
    return replace(tree, segments=(replace(tree.segments[0], versions=np.array(versions, np.int32)),))


@pytest.mark.parametrize(
    ("versions", "written"),
    [
        ([3], 3),
        ([3, 3, 3], 3),
        ([3, 4], [[3, 1], [4, 1]]),
        ([0, 0, 0, 7, 8, 8], [[0, 3], [7, 1], [8, 2]]),
        ([2**31 - 1, 0], [[2**31 - 1, 1], [0, 1]]),  # a server's versions may fall
    ],
)
def test_versions_are_written_as_runs(versions: list[int], written: Any) -> None:
    assert orjson.loads(to_json(_of_versions(versions)))["segments"][0]["version"] == written


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_versions_survive_json(versions: list[int]) -> None:
    (segment,) = from_json(to_json(_of_versions(versions))).segments
    np.testing.assert_array_equal(segment.versions, np.array(versions, np.int32), strict=True)


@pytest.mark.parametrize(
    "version",
    [
        [],
        [[3, 3]],
        [[3, 1], [4, 2]],
        [[3, 2], [4, 0]],
        [[3, 3], [4, -1]],
        [[-1, 2]],
        [[3, 2, 4]],
        [[3]],
        [3, 2],
        [[True, 2]],
        [[3.0, 2]],
        [[2**31, 2]],
        [[3, 2**63 - 1], [4, 2**63 - 1]],
        -1,
        2**31,
        True,
        None,
        "3",
    ],
)
def test_versions_that_do_not_fit_the_tokens_are_refused(version: Any) -> None:
    record = orjson.loads(to_json(_of_versions([3, 3])))
    record["segments"][0]["version"] = version
    with pytest.raises((ValueError, OverflowError)):
        from_json(orjson.dumps(record))


def _routed(segment: np.ndarray | None, prompt: np.ndarray | None, *tokens: int) -> Tree:
    """A tree of one segment with these tokens."""
    segments = (replace(_segment(PROMPT, *tokens), routes=segment),)
    return Tree("p", np.array([7], np.int32), segments, (Leaf(0, Stop.EOS),), prompt)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("seed", range(5))
def test_routes_survive_json_if_they_are_asked_for(seed: int, dtype: type[np.unsignedinteger]) -> None:
    rng = np.random.default_rng(seed)
    plain = random_tree(rng)
    tree = with_routes(plain, rng, dtype)
    assert to_json(tree) == to_json(plain)
    line = to_json(tree, routes=True)
    back = from_json(line)
    assert to_json(back, routes=True) == line
    np.testing.assert_array_equal(back.prompt_routes, tree.prompt_routes, strict=True)
    for ours, theirs in zip(tree.segments, back.segments, strict=True):
        np.testing.assert_array_equal(ours.routes, theirs.routes, strict=True)
    assert to_json(plain, routes=True) == to_json(plain)


def test_routes_are_readable() -> None:
    routes = np.array([[[1, 2], [259, 65535]]], np.uint16)
    record = orjson.loads(to_json(_routed(routes, routes, 5), routes=True))
    assert record["segments"][0]["routes"] == {
        "dtype": "uint16",
        "shape": [1, 2, 2],
        "base64": "AQACAAMB//8=",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base64", "AQACAAMB//8"),
        ("base64", "AQACAAMB//8=AA=="),
        ("base64", "AQAC AAMB//8="),
        ("base64", "AQACAAMB__8="),
        ("base64", "AQACAAMB"),
        ("base64", "é"),
        ("base64", 7),
        ("base64", None),
        ("dtype", "uint8"),
        ("dtype", "int16"),
        ("dtype", "object"),
        ("dtype", None),
        ("shape", [2, 1, 2]),
        ("shape", [1, 2, 3]),
        ("shape", [1, 2, 2, 1]),
        ("shape", [4]),
        ("shape", [-1, -2, 2]),
        ("shape", [0, 2, 2]),
        ("shape", [1, 2, 2**62]),
        ("shape", [1.0, 2, 2]),
        ("shape", [True, 2, 2]),
        ("shape", "1,2,2"),
    ],
)
@pytest.mark.parametrize("of_prompt", [False, True])
def test_routes_that_are_none_are_refused(key: str, value: Any, of_prompt: bool) -> None:
    routes = np.array([[[1, 2], [259, 65535]]], np.uint16)
    record = orjson.loads(to_json(_routed(routes, routes, 5), routes=True))
    (record["prompt_routes"] if of_prompt else record["segments"][0]["routes"])[key] = value
    with pytest.raises((ValueError, OverflowError)):
        from_json(orjson.dumps(record))


@pytest.mark.parametrize(
    ("prompt", "segment", "message"),
    [
        (None, np.zeros((2, 3, 2), np.uint8), "segment 0 has only some tokens with routes"),
        (np.zeros((1, 3, 2), np.uint8), None, "segment 0 has only some tokens with routes"),
        (np.zeros((1, 3, 2), np.uint8), np.zeros((1, 3, 2), np.uint8), "2 tokens and the routes of 1"),
        (np.zeros((2, 3, 2), np.uint8), np.zeros((2, 3, 2), np.uint8), "the prompt has 1 tokens and the rou"),
        (np.zeros((1, 3, 2), np.uint8), np.zeros((2, 3, 2), np.uint16), "routes of uint16 .*others of uint8"),
        (np.zeros((1, 3, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), "routes of uint8 .2, 3., and others"),
        (np.zeros((1, 3, 2), np.int64), np.zeros((2, 3, 2), np.int64), "routes of type int64"),
        (np.zeros((1, 6), np.uint8), np.zeros((2, 6), np.uint8), "type uint8 and shape .1, 6."),
        (np.zeros((1, 0, 2), np.uint8), np.zeros((2, 0, 2), np.uint8), "type uint8 and shape .1, 0, 2."),
    ],
)
def test_routes_that_do_not_fit_are_refused(
    prompt: np.ndarray | None, segment: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _routed(segment, prompt, 1, 2)
