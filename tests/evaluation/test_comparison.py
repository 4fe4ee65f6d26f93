"""Paired differences between two evaluations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.evaluations import config_of, document, graded_problem, prompt_of
from treepo.errors import DataError
from treepo.evaluation.comparison import compare, different_conditions
from treepo.evaluation.results import OVERALL, read_results
from treepo.tree import Verdict

C, W = Verdict.CORRECT, Verdict.WRONG


def results(shares: dict[str, list[int]], first: int = 0, answer: str = "2") -> dict[str, Any]:
    """shares: for each problem, how many of its four responses are correct. first: the first problem's id."""
    benchmarks = {
        name: [
            (prompt, graded_problem(prompt, [C] * right + [W] * (4 - right)))
            for index, right in enumerate(rights, start=first)
            for prompt in [prompt_of(name, index, answer=answer)]
        ]
        for name, rights in shares.items()
    }
    return document(config_of("out", 4, tuple(shares)), benchmarks)


def test_an_evaluation_does_not_differ_from_itself() -> None:
    one = results({"a": [0, 1, 4], "b": [2, 2]})
    for row in compare(one, one):
        assert (row.difference.value, row.difference.low, row.difference.high) == (0, 0, 0)


def test_a_difference_is_over_the_common_problems_and_changes_its_sign_with_the_order() -> None:
    one, two = results({"a": [0, 2, 4, 1]}), results({"a": [3, 4, 4]}, first=1)
    (row,) = [row for row in compare(one, two) if row.metric == "mean"]
    # Problems 1, 2 and 3: (2, 4, 1) against (3, 4, 4) of four.
    assert row.difference.problems == 3
    assert (row.first, row.second) == pytest.approx((7 / 12, 11 / 12))
    assert row.difference.value == pytest.approx(4 / 12)
    (back,) = [row for row in compare(two, one) if row.metric == "mean"]
    assert back.difference.value == -row.difference.value
    assert (back.difference.low, back.difference.high) == pytest.approx(
        (-row.difference.high, -row.difference.low), abs=0.05
    )


def test_pairing_makes_a_constant_gain_certain_however_problems_differ() -> None:
    hard = np.random.default_rng(0).integers(0, 4, size=40).tolist()
    one, two = results({"a": hard}), results({"a": [right + 1 for right in hard]})
    mean = next(row for row in compare(one, two) if row.metric == "mean")
    assert mean.difference.low == mean.difference.high == pytest.approx(0.25)


def test_several_benchmarks_are_also_taken_together_by_size() -> None:
    one, two = results({"a": [0], "b": [0, 0, 0]}), results({"a": [4], "b": [0, 0, 0]})
    means = {row.benchmark: row.difference.value for row in compare(one, two) if row.metric == "mean"}
    assert means == {"a": 1.0, "b": 0.0, OVERALL: 0.25}


def test_what_makes_scores_measure_something_else_is_named() -> None:
    one = results({"a": [1]})
    assert different_conditions(one, one) is None
    other = json.loads(json.dumps(one))
    other["settings"]["reward"]["answer"] = "boxed_or_last"
    other["settings"]["sampling"] |= {"max_response_tokens": 64, "temperature": 0.1}
    most = one["settings"]["sampling"]["max_response_tokens"]
    assert different_conditions(one, other) == (
        "A and B were not evaluated alike: reward.answer is 'boxed' in A and 'boxed_or_last' in B; "
        f"sampling.max_response_tokens is {most} in A and 64 in B"
    )
    del other["settings"]["reward"]["answer"]  # as before there was a choice
    other["settings"]["sampling"]["max_response_tokens"] = most
    assert different_conditions(one, other) is None


def test_evaluations_without_common_problems_or_with_other_answers_are_refused() -> None:
    with pytest.raises(DataError, match="no problem in common: one has a, the other b"):
        compare(results({"a": [1]}), results({"b": [1]}))
    with pytest.raises(DataError, match="problem a:0 has the gold answer '2' in one evaluation and '3'"):
        compare(results({"a": [1]}), results({"a": [1]}, answer="3"))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema": 99}'])
def test_a_file_that_is_not_a_result_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json: "):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("overall", "tokens", "unique"), None),
        (("overall", "tokens"), {}),
        (("overall", "metrics", "mean", "low"), None),
        (("overall", "metrics", "mean", "value"), 1e300),
        (("settings", "sampling", "width"), 10**400),
        (("problems", 0, "metrics", "mean"), "NaN"),
    ],
)
def test_a_number_that_no_evaluation_has_is_named(
    tmp_path: Path, path: tuple[Any, ...], value: object
) -> None:
    document = results({"a": [1, 2]})
    holder: Any = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=rf"results\.json: {'.'.join(map(str, path[:4]))[:20]}") as caught:
        read_results(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_document_is_read_back_as_it_was(tmp_path: Path) -> None:
    one = results({"a": [1, 2]})
    (tmp_path / "results.json").write_text(json.dumps(one))
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == one
