"""Scores compared with brute force, and with what they must not depend on."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.evaluation.metrics import (
    RESAMPLES,
    ProblemResult,
    estimate,
    estimates,
    length_metrics,
    problem_metrics,
    sample_counts,
)
from treepo.rewards.voting import NO_VOTE
from treepo.tree import Stop, Verdict


def problem(outcomes: str, **changes: object) -> ProblemResult:
    """One response a letter: `c` correct, `x`, `y`, `z` wrong answers, `-` none, `t` timeout, `e` error."""
    verdicts = {"c": Verdict.CORRECT, "-": Verdict.NO_ANSWER, "t": Verdict.TIMEOUT, "e": Verdict.ERROR}
    result = ProblemResult(
        benchmark="b",
        id="b:0",
        answer="1",
        verdicts_L=tuple(verdicts.get(letter, Verdict.WRONG) for letter in outcomes),
        classes_L=tuple({"c": 0, "x": 1, "y": 2, "z": 3}.get(letter, NO_VOTE) for letter in outcomes),
        weights_L=(1.0,) * len(outcomes),
        tokens_L=(10,) * len(outcomes),
        stops_L=(Stop.EOS,) * len(outcomes),
        unique_tokens=10 * len(outcomes),
    )
    return replace(result, **changes)


def winner(letters: tuple[str, ...]) -> float:
    """The majority vote by counting; ties share."""
    votes = Counter(letter for letter in letters if letter in "cxyz")
    if not votes:
        return 0.0
    ahead = [letter for letter, count in votes.items() if count == max(votes.values())]
    return ("c" in ahead) / len(ahead)


OUTCOMES = st.text("cxyz-te", min_size=1, max_size=7)


@given(OUTCOMES)
def test_scores_average_over_every_subset_of_the_graded_responses(outcomes: str) -> None:
    result = problem(outcomes)
    graded = [letter for letter in outcomes if letter not in "te"]
    if not graded:
        assert all(map(math.isnan, (result.mean(), result.majority(), result.pass_at(1))))
        return
    assert result.mean() == graded.count("c") / len(graded)
    assert result.majority() == winner(tuple(graded))
    for k in range(1, len(graded) + 1):
        subsets = list(combinations(graded, k))
        assert result.pass_at(k) == pytest.approx(sum("c" in subset for subset in subsets) / len(subsets))
        expected = sum(map(winner, subsets)) / len(subsets)
        # Five standard deviations of the mean of RESAMPLES numbers between 0 and 1.
        assert result.majority_at(k, seed=0) == pytest.approx(expected, abs=2.5 / RESAMPLES**0.5)
    assert math.isnan(result.pass_at(len(graded) + 1))
    assert math.isnan(result.majority_at(len(graded) + 1, seed=0))


@given(st.text("cxy-", min_size=1, max_size=5))
def test_the_bootstrapped_vote_averages_over_every_draw_with_replacement(outcomes: str) -> None:
    draws = list(product(outcomes, repeat=len(outcomes)))
    expected = sum(map(winner, draws)) / len(draws)
    assert problem(outcomes).majority_bootstrap(0) == pytest.approx(expected, abs=2.5 / RESAMPLES**0.5)


def test_scores_do_not_depend_on_the_order_of_the_responses_nor_on_other_problems() -> None:
    scores = problem_metrics(problem("ccxxyz-t"), 8, seed=3, voting=True)
    assert problem_metrics(problem("t-zyxxcc"), 8, seed=3, voting=True) == pytest.approx(scores, nan_ok=True)
    assert scores["maj@4"] == problem("ccxxyz-t").majority_at(4, seed=3)
    assert scores["maj@4"] != problem("ccxxyz-t", id="b:1").majority_at(4, seed=3)


def test_without_extracted_answers_there_are_no_votes() -> None:
    assert not [name for name in problem_metrics(problem("cx"), 2, 0, voting=False) if "maj" in name]


def test_a_weighted_mean_counts_graded_responses_by_their_weight() -> None:
    assert problem("ctx", weights_L=(3.0, 9.0, 1.0)).weighted_mean() == 0.75
    assert problem("ccx").weighted_mean() == problem("ccx").mean()


@pytest.mark.parametrize(
    ("n", "counts"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])]
)
def test_sample_counts(n: int, counts: list[int]) -> None:
    assert sample_counts(n) == counts


def test_the_overall_mean_weighs_each_benchmark_by_its_size() -> None:
    small, large = np.array([1.0, 1.0]), np.array([0.0, 1.0, 0.0, 0.0, np.nan])
    both = estimate([small, large], seed=0)
    assert both.value == pytest.approx(3 / 6)
    assert both.problems == 6
    assert both.low <= both.value <= both.high


def test_benchmarks_are_resampled_each_to_its_own_size() -> None:
    """If values differ only between benchmarks, resampling changes nothing."""
    flat = estimate([np.zeros(5), np.ones(5)], seed=0)
    assert (flat.low, flat.value, flat.high) == (0.5, 0.5, 0.5)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth, trials = 0.3, 200
    draws = np.random.default_rng(0).random((trials, 60)) < truth
    covered = sum(
        interval.low <= truth <= interval.high
        for interval in (estimate([row.astype(float)], seed=trial) for trial, row in enumerate(draws))
    )
    # 95% of 200 trials, binomial deviation 3; the percentile bootstrap of 60 problems is slightly too narrow.
    assert 0.88 < covered / trials < 0.99


def test_the_mean_of_nothing_is_nan() -> None:
    nothing = estimate([np.array([np.nan]), np.array([])], seed=0)
    assert math.isnan(nothing.value)
    assert nothing.problems == 0
    assert estimates([[]], 0) == {}


def test_responses_that_a_limit_ended_are_truncated() -> None:
    ends = (Stop.LIMIT, Stop.EOS, Stop.DEPTH, Stop.BOXED)
    lengths = length_metrics([problem("cccc", stops_L=ends, tokens_L=(1, 2, 3, 4))])
    assert lengths["truncated"] == 0.5
    assert (lengths["mean"], lengths["median"], lengths["max"]) == (2.5, 2.5, 4)
