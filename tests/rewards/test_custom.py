"""What a reward function may return: numbers, texts and verdicts not by what they look like."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.support.random_trees import random_tree
from treepo.config.reward import RewardConfig
from treepo.rewards.custom import BadGradeError, grade_of
from treepo.rewards.grade import Grade
from treepo.rewards.shaping import with_grades
from treepo.training.metrics import reward_metrics
from treepo.tree import Verdict, from_json, to_json

CORRECT, WRONG = Verdict.CORRECT, Verdict.WRONG


@pytest.mark.parametrize(
    "half", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2), Decimal("0.5")]
)
def test_a_number_of_any_library_is_a_reward(half: object) -> None:
    expected = Grade(0.5, CORRECT, terms={"style": 0.5})
    assert grade_of(half) == Grade(0.5, CORRECT)
    assert grade_of({"reward": half, "style": half}) == expected


@pytest.mark.parametrize(
    ("correct", "verdict"),
    [(True, CORRECT), (False, WRONG), (1, CORRECT), (0.0, WRONG), (np.True_, CORRECT), (None, WRONG)],
)
def test_the_verdict_is_true_false_one_or_zero(correct: object, verdict: Verdict) -> None:
    assert grade_of({"reward": -1, "correct": correct}) == Grade(-1.0, verdict)


@pytest.mark.parametrize("text", ["1.0", "nan", "true", "None", "", "5 \u00bd", np.str_("1.0")])
def test_a_text_stays_a_text_whatever_it_looks_like(text: str) -> None:
    grade = grade_of({"reward": True, "prediction": text, "length": 3, "comment": None})
    assert grade == Grade(1.0, CORRECT, terms={"length": 3.0}, texts={"prediction": str(text)})
    assert type(grade.texts["prediction"]) is str


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "it returned reward = None; allowed: a number, or a dict"),
        ("1.0", "it returned reward = '1.0', which is text; allowed: a number"),
        (b"1", "it returned reward = b'1', which is text"),
        (math.nan, "it returned reward = nan, which is not finite"),
        (np.float32("inf"), "it returned reward = inf, which is not finite"),
        (10**400, "which is no number"),
        (1j, "it returned reward = 1j, which is no number"),
        ([1.0], "it returned reward = [1.0], which is no number"),
        (np.ones((2, 2)), "which is no number"),
        (torch.ones(2), "which is no number"),
        ({}, 'it returned a dict without "reward", only []'),
        ({"score": 1}, "it returned a dict without \"reward\", only ['score']"),
        ({"reward": None}, "it returned reward = None"),
        ({"reward": 1, "style": math.inf}, "it returned style = inf, which is not finite"),
        (
            {"reward": 1, "style": [1]},
            "it returned style = [1], which is no number; allowed: a number, a",
        ),
        ({"reward": 1, "correct": "true"}, "it returned correct = 'true', which is text; allowed: a number"),
        ({"reward": 1, "correct": 0.7}, "it returned correct = 0.7; allowed: true, false, 1, 0"),
    ],
)
def test_what_is_no_grade_says_why(result: object, said: str) -> None:
    with pytest.raises(BadGradeError) as raised:
        grade_of(result)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_texts_are_written_with_the_tree_and_are_no_metric() -> None:
    tree = random_tree(np.random.default_rng(0))
    grades = [grade_of({"reward": 1, "taken": "half \ud83d of it", "size": "7"}) for _ in tree.leaves]
    graded = with_grades(tree, ["" for _ in tree.leaves], grades, RewardConfig(), 10)
    expected = {"taken": "half \\ud83d of it", "size": "7"}
    read = from_json(to_json(graded))
    assert [leaf.texts for leaf in read.leaves] == [expected] * len(grades)
    assert reward_metrics(read.leaves) == {}
