"""Terms of the reward: each by hand, their sum on trees, and the fields that no term may change."""

import math

import numpy as np
import pytest

from tests.support.small_trees import random_batch
from treepo.config.reward import RewardConfig
from treepo.rewards.grade import Grade
from treepo.rewards.shaping import shaped, with_grades
from treepo.rewards.terms import TERMS, Responses
from treepo.training.metrics import reward_metrics
from treepo.tree import Tree, Verdict, from_json, to_json

ALL_TERMS = {"overlong": 0.5, "length": 0.2, "format_boxed": 0.1, "format_one_box": 0.05}


def config_of(**settings: object) -> RewardConfig:
    return RewardConfig.model_validate(settings)


def responses_of(
    tokens: list[int], correct: list[bool] | None = None, buffer: int | None = None
) -> Responses:
    correct = [True] * len(tokens) if correct is None else correct
    return Responses(("",) * len(tokens), np.array(tokens), np.array(correct), 7168, buffer)


def random_grades(rng: np.random.Generator, tree: Tree) -> tuple[list[str], list[Grade]]:
    """A text and a grade for each leaf; one in four could not be graded."""
    texts = [r"\boxed{1} " * int(rng.integers(0, 3)) for _ in tree.leaves]
    grades = []
    for _ in tree.leaves:
        if rng.random() < 0.25:
            grades.append(Grade(None, Verdict.TIMEOUT))
        else:
            verdict = Verdict.CORRECT if rng.random() < 0.5 else Verdict.WRONG
            grades.append(Grade(float(rng.normal()), verdict, terms={"style": float(rng.random())}))
    return texts, grades


def test_overlong_in_the_papers_setting() -> None:
    tokens = [0, 6656, 6784, 6912, 7168, 9000]
    assert TERMS["overlong"](responses_of(tokens, buffer=512)).tolist() == [0, 0, -0.25, -0.5, -1, -1]


def test_length_is_relative_to_the_prompts_other_responses() -> None:
    length = TERMS["length"]
    # 100, 150 and 300 tokens: 0, a quarter and all of the way from the shortest to the longest.
    assert length(responses_of([100, 150, 300])).tolist() == [0.5, 0.25, -0.5]
    wrong = responses_of([100, 150, 300], [False, True, False])
    assert length(wrong).tolist() == [0.0, 0.25, -0.5]
    assert length(responses_of([100, 100])).tolist() == [0, 0]
    assert length(responses_of([7])).tolist() == [0]


def test_format_terms_count_boxes() -> None:
    texts = ("none", r"\boxed{1}", r"\boxed{1} \boxed{2}", r"put it in \boxed{}: \boxed{3}", r"\boxed{1")
    responses = Responses(texts, np.ones(5), np.ones(5, dtype=bool), max_tokens=10)
    assert TERMS["format_boxed"](responses).tolist() == [0, 1, 1, 1, 0]
    assert TERMS["format_one_box"](responses).tolist() == [0, 1, 0, 1, 0]


def test_rewards_are_the_graders_plus_each_weighted_term() -> None:
    assert ALL_TERMS.keys() == TERMS.keys()
    rng = np.random.default_rng(0)
    config = config_of(terms=ALL_TERMS, overlong_buffer_tokens=8)
    for tree in random_batch(rng, 30):
        texts, grades = random_grades(rng, tree)
        result = with_grades(tree, texts, grades, config, max_response_tokens=16)
        lengths = [len(tree.response(leaf)) for leaf in tree.leaves]
        graded = [at for at, grade in enumerate(grades) if grade.reward is not None]
        for at, (leaf, trained) in enumerate(zip(result.leaves, shaped(result).leaves, strict=True)):
            grade = grades[at]
            assert (leaf.reward, leaf.verdict, leaf.numbers) == (grade.reward, grade.verdict, grade.terms)
            assert (trained.segment, trained.stop, trained.verdict) == (leaf.segment, leaf.stop, leaf.verdict)
            if grade.reward is None:
                assert (leaf.terms, trained.reward) == ({}, None)
                continue
            among = Responses(
                tuple(texts[i] for i in graded),
                np.array([lengths[i] for i in graded]),
                np.array([grades[i].verdict is Verdict.CORRECT for i in graded]),
                max_tokens=16,
                overlong_buffer_tokens=8,
            )
            place = graded.index(at)
            expected = {n: w * float(TERMS[n](among)[place]) for n, w in ALL_TERMS.items()}
            # Sums of the same few doubles, perhaps in another order.
            assert leaf.terms == pytest.approx(expected, abs=1e-15)
            assert trained.reward == pytest.approx(grade.reward + sum(expected.values()), abs=1e-14)


def test_an_ungraded_response_counts_in_no_term() -> None:
    """The longest response could not be graded: the lengths of the others are as if it were not there."""
    rng = np.random.default_rng(1)
    (tree,) = random_batch(rng, 1, least_leaves=4)
    lengths = [len(tree.response(leaf)) for leaf in tree.leaves]
    grades = [Grade(1.0, Verdict.CORRECT) for _ in lengths]
    grades[int(np.argmax(lengths))] = Grade(None, Verdict.ERROR)
    texts = [""] * len(lengths)
    result = with_grades(tree, texts, grades, config_of(terms={"length": 1.0}), max_response_tokens=99)
    rest = [leaf.terms["length"] for leaf in result.leaves if leaf.terms]
    graded = [length for length, grade in zip(lengths, grades, strict=True) if grade.reward is not None]
    assert rest == TERMS["length"](responses_of(graded)).tolist()


def test_without_terms_nothing_changes() -> None:
    rng = np.random.default_rng(2)
    (tree,) = random_batch(rng, 1)
    texts, grades = random_grades(rng, tree)
    result = with_grades(tree, texts, grades, config_of(), max_response_tokens=2)
    assert shaped(result) is result
    assert all(leaf.terms == {} for leaf in result.leaves)


def test_terms_and_numbers_survive_the_line_of_json() -> None:
    rng = np.random.default_rng(3)
    config = config_of(terms=ALL_TERMS, overlong_buffer_tokens=8)
    for tree in random_batch(rng, 5):
        result = with_grades(tree, *random_grades(rng, tree), config, max_response_tokens=16)
        assert from_json(to_json(result)).leaves == result.leaves


def test_metrics_name_each_term_and_each_number_of_the_grader() -> None:
    rng = np.random.default_rng(4)
    config = config_of(terms=ALL_TERMS, overlong_buffer_tokens=8)
    trees = [
        with_grades(tree, *random_grades(rng, tree), config, max_response_tokens=16)
        for tree in random_batch(rng, 5)
    ]
    graded = [leaf for tree in trees for leaf in tree.leaves if leaf.reward is not None]
    metrics = reward_metrics([leaf for tree in trees for leaf in tree.leaves])
    names = {f"term/{name}" for name in ALL_TERMS} | {"grader/style", "reward_with_terms"}
    assert metrics.keys() == names
    for name in ALL_TERMS:
        assert metrics[f"term/{name}"] == pytest.approx(np.mean([leaf.terms[name] for leaf in graded]))
    trained = [leaf.reward for tree in trees for leaf in shaped(tree).leaves if leaf.reward is not None]
    assert metrics["reward_with_terms"] == pytest.approx(np.mean(trained))
    assert all(math.isfinite(value) for value in metrics.values())
