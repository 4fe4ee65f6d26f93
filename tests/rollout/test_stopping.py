"""Stops: their order, the agreement of engine and driver, and which responses count as loops."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.config.sampling import RepetitionConfig, SamplingConfig
from treepo.rollout.boxed import BoxScan, last_boxed
from treepo.rollout.stopping import StopRule, repeats
from treepo.tree import Stop

TEXTS = ["a", "b", "\\", "boxed", "{", "}", "\\boxed", "{5}", " ", "\\boxed{7}", "é"]
TEXTS += ["", "\\\\", "x\\", "ox", "ed{", "fb", "\\fbox{1}", "\\b", "frac", "\\frac{1}{2}", "oxed{2} \\"]
LOOP = {"window_tokens": 2, "count": 3, "min_distinct": 1}


def decode(tokens: np.ndarray) -> str:
    return "".join(TEXTS[token % len(TEXTS)] for token in tokens)


def rule(**values: Any) -> StopRule:
    return StopRule(
        SamplingConfig(**{"segment_tokens": 4, "max_depth": 3, "max_response_tokens": 12, **values}), decode
    )


def why(stop_rule: StopRule, tokens: list[int], eos: bool = False) -> Stop | None:
    array = np.array(tokens, dtype=np.int32)
    return stop_rule.classify(array, stop_rule.scan(BoxScan(), array), eos)


BOXED = [0, 9]
LOOPING = [0, 1] * 3


@pytest.mark.parametrize(
    ("stops", "tokens", "eos", "stop"),
    [
        ({}, BOXED, False, Stop.BOXED),
        ({}, BOXED, True, Stop.BOXED),
        ({}, [0, 1], True, Stop.EOS),
        ({}, [0, 1], False, None),
        ({"boxed": "with_eos"}, BOXED, False, None),
        ({"boxed": "with_eos"}, BOXED, True, Stop.BOXED),
        ({"boxed": "with_eos"}, [0], True, Stop.EOS),
        ({"boxed": "off"}, BOXED, True, Stop.EOS),
        ({}, [0] * 11 + [9], False, Stop.BOXED),
        ({"boxed": "off"}, [0] * 12, True, Stop.EOS),
        ({"boxed": "off"}, [0] * 12, False, Stop.LIMIT),
        ({"boxed": "off"}, [0, 1] * 4 + [2], False, Stop.DEPTH),
        ({"repetition": {**LOOP, "check": "first"}}, LOOPING, True, Stop.REPETITION),
        ({"repetition": {**LOOP, "check": "last"}}, LOOPING, True, Stop.EOS),
        ({"repetition": {**LOOP, "check": "last"}}, LOOPING, False, Stop.REPETITION),
        ({"repetition": {**LOOP, "check": "last"}}, [9, *LOOPING], False, Stop.BOXED),
        ({"repetition": {**LOOP, "check": "first"}}, [9, *LOOPING], False, Stop.REPETITION),
        ({"repetition": {**LOOP, "check": "last"}}, LOOPING * 2, False, Stop.LIMIT),
        ({"repetition": {**LOOP, "check": "first"}}, LOOPING * 2, False, Stop.REPETITION),
        ({"repetition": {**LOOP, "check": "off"}}, LOOPING, False, None),
    ],
)
def test_the_order_of_the_stops(
    stops: dict[str, Any], tokens: list[int], eos: bool, stop: Stop | None
) -> None:
    assert why(rule(stops=stops), tokens, eos) == stop


def test_depth_limits_trees_only() -> None:
    long = {"max_response_tokens": 100, "stops": {"boxed": "off"}}
    assert why(rule(**long), [0, 1] * 6) == Stop.DEPTH
    assert why(rule(**long, mode="sequential"), [0, 1] * 6) is None


@given(st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=40), st.integers(1, 7))
def test_scanning_in_pieces_finds_what_scanning_at_once_finds(tokens: list[int], piece: int) -> None:
    stop_rule = rule(stops={"repetition": {"check": "off"}})
    array = np.array(tokens, dtype=np.int32)
    scan = BoxScan()
    for start in range(0, len(array), piece):
        scan = stop_rule.scan(scan, array[start : start + piece])
    assert scan.found == stop_rule(array) == (last_boxed(decode(array)) is not None)


@given(st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=30), st.integers(1, 30))
def test_text_in_which_no_box_begins_need_not_be_read(tokens: list[int], piece: int) -> None:
    stop_rule = rule()
    array = np.array(tokens, dtype=np.int32)
    scan = naive = BoxScan()
    for start in range(0, len(array), piece):
        scan = stop_rule.scan(scan, array[start : start + piece])
        naive = naive.extend(decode(array[start : start + piece]))
        assert scan == naive


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_the_engine_stops_where_the_driver_would(tokens: list[int]) -> None:
    stop_rule = rule(max_depth=100, max_response_tokens=1000, stops={"repetition": {**LOOP, "check": "last"}})
    assert stop_rule(np.array(tokens, dtype=np.int32)) == (why(stop_rule, tokens) is not None)


def test_a_rule_can_be_pickled_for_the_engine_s_process() -> None:
    stop_rule = rule()
    stop_rule(np.array(BOXED))
    assert pickle.loads(pickle.dumps(stop_rule))(np.array(BOXED))


def text(string: str) -> np.ndarray:
    return np.frombuffer(string.encode(), dtype=np.uint8).astype(np.int32)


SENTENCE = "The quick brown fox jumps over the lazy dog near the bank. "


@pytest.mark.parametrize(
    ("response", "loops"),
    [
        (SENTENCE * 8, True),
        (SENTENCE * 7, False),
        ("A start without any loop. " * 2 + SENTENCE * 8, True),
        (SENTENCE * 20 + "But that is no way to go on; let us think of something else.", False),
        ("wait, " * 60, True),
        ("0.3333" + "3" * 300, True),
        ("-" * 39, False),  # one table rule
        (("| a | b |" * 4 + "\n" + "-" * 39 + "\n") * 3, False),
        (
            "".join(f"Value {i * i} is followed by {i**3}; then {i * 7}\n{'-' * 60}\n" for i in range(30)),
            False,
        ),
        ("".join(f"{i}: {i**5 * 7919}, " for i in range(400)), False),
    ],
)
def test_loops_and_table_rules(response: str, loops: bool) -> None:
    assert repeats(text(response), RepetitionConfig()) == loops


def naive_repeats(tokens: list[int], window: int, count: int) -> bool:
    """Counts occurrences of the last run without overlap, from the end."""
    last, end, found = tokens[-window:], len(tokens), 0
    while end >= window:
        hit = tokens[end - window : end] == last
        found, end = found + hit, end - (window if hit else 1)
    return found >= count


@given(st.lists(st.integers(0, 1), min_size=1, max_size=80), st.integers(1, 5), st.integers(2, 5))
def test_repetition_is_the_naive_count(tokens: list[int], window: int, count: int) -> None:
    config = RepetitionConfig(window_tokens=window, count=count, min_distinct=1)
    assert repeats(np.array(tokens, dtype=np.int32), config) == naive_repeats(tokens, window, count)
