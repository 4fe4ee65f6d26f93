"""Held-out sets in a run: their numbers, their sampling, one version of the weights, their errors."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.small_trees import tree_of
from tests.support.training_runs import ASYNC, Run, config_of, lines, slow_engine, slow_trainer
from treepo.errors import DataError
from treepo.preflight.inputs import read_train_inputs
from treepo.training.metrics import accuracy, evaluated_sets, heldout_metrics, standard_error
from treepo.tree import Tree, Verdict

pytestmark = pytest.mark.usefixtures("graded")


def answers_to(right: int, wrong: int, ungraded: int = 0) -> Tree:
    """A prompt with so many correct and wrong answers, and others without a grade."""
    verdicts = [Verdict.CORRECT] * right + [Verdict.WRONG] * wrong + [Verdict.TIMEOUT] * ungraded
    rewards = [1.0 if verdict is Verdict.CORRECT else 0.0 for verdict in verdicts]
    tree = tree_of([-1] * len(verdicts), rewards)
    leaves = tuple(
        type(leaf)(leaf.segment, leaf.stop, None if verdict is Verdict.TIMEOUT else leaf.reward, verdict)
        for leaf, verdict in zip(tree.leaves, verdicts, strict=True)
    )
    return Tree(tree.prompt_id, tree.prompt, tree.segments, leaves)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_standard_error_is_the_spread_of_the_accuracy_over_draws_of_prompts(ragged: bool) -> None:
    """Against a bootstrap over 200 prompts of 4 answers, some without a grade, to 5%: 4000 draws are good to
    1.1%, and the linearized error of a ratio to 1 / 200.
    """
    rng = np.random.default_rng(3)
    share_P = rng.beta(1, 1, 200)
    trees = []
    for share in share_P:
        ungraded = int(rng.integers(0, 4)) if ragged else 0
        right = int(rng.binomial(4 - ungraded, share))
        trees.append(answers_to(right, 4 - ungraded - right, ungraded))
    counts = np.array([_counts(tree) for tree in trees])
    draws = rng.integers(0, 200, (4000, 200))
    drawn = counts[draws].sum(axis=1)
    assert standard_error(trees) == pytest.approx((drawn[:, 0] / drawn[:, 1]).std(), rel=0.05)
    assert accuracy(trees) == counts[:, 0].sum() / counts[:, 1].sum()


def _counts(tree: Tree) -> tuple[int, int]:
    verdicts = [leaf.verdict for leaf in tree.leaves if leaf.verdict is not Verdict.TIMEOUT]
    return verdicts.count(Verdict.CORRECT), len(verdicts)


def test_answers_that_are_all_alike_have_an_error_and_one_prompt_has_none() -> None:
    for tree in (answers_to(2, 0), answers_to(0, 2)):
        assert standard_error([tree] * 8) == pytest.approx(math.sqrt(0.9 * 0.1 / 8))
    assert math.isnan(standard_error([answers_to(1, 1)]))
    assert math.isnan(standard_error([answers_to(0, 0, 2), answers_to(1, 1)])), "one has a grade"


def test_a_set_is_found_by_the_names_of_its_numbers() -> None:
    tree = answers_to(1, 1)
    metrics = heldout_metrics("heldout", [tree]) | heldout_metrics("a-1", [tree])
    assert evaluated_sets(["step", "reward", "train/accuracy", "heldout/best_step", *metrics]) == [
        "heldout",
        "a-1",
    ]


@pytest.mark.parametrize("changes", [{}, ASYNC])
def test_every_set_is_sampled_as_it_says_and_of_one_version(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    problems = str(folder / "problems.jsonl")
    sets = {
        "greedy": {"path": problems, "temperature": 0, "samples": 1, "max_problems": 4},
        "many": {"path": problems, "samples": 3, "top_k": 5, "top_p": 0.9, "max_response_tokens": 4},
    }
    evaluation = {"every": 2, "samples": 2, "temperature": 0.7, "max_problems": 5, "sets": sets}
    config = config_of(folder, tmp_path / "run", 5, evaluation=evaluation, **changes)
    run = Run(config, engine=slow_engine(), trainer=slow_trainer(5))
    run.train()
    records = lines(config.out / "heldout_trees.jsonl")
    for step in (0, 2, 4, 5):
        found = [record for record in records if record["step"] == step]
        counts = {
            name: [len(one["leaves"]) for one in found if one["set"] == name] for name in ("heldout", *sets)
        }
        assert counts == {"heldout": [2] * 5, "greedy": [1] * 4, "many": [3] * 5}
        assert {segment["version"] for one in found for segment in one["segments"]} == {step}
    by_temperature: dict[float, set[tuple[Any, ...]]] = {}
    for request in run.engine.requests:
        options = (request.top_k, request.top_p, request.max_tokens <= 4)
        by_temperature.setdefault(request.temperature, set()).add(options)
    assert by_temperature[0.7] >= {(5, 0.9, True)}
    assert {options[:2] for options in by_temperature[0.0]} == {(None, 1.0)}
    evaluations = [line for line in lines(config.out / "metrics.jsonl") if evaluated_sets(line)]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 5]
    assert all(evaluated_sets(line) == ["heldout", "greedy", "many"] for line in evaluations)


def test_an_error_of_a_set_names_its_key(folder: Path, tmp_path: Path) -> None:
    sets = {"math": {"path": str(folder / "problems.jsonl"), "columns": {"prompt": "absent"}}}
    config = config_of(folder, tmp_path / "run", 2, evaluation={"sets": sets})
    with pytest.raises(DataError, match=r"evaluation\.sets\.math\.columns"):
        read_train_inputs(config)
