"""benchmarks/learning without its runs: the tasks, that arms decode equally many tokens, and the summary."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.learning import search, sums
from benchmarks.learning.arms import ARMS, BASELINE, CONFIG, TASKS, overrides, tokens_a_tree
from benchmarks.learning.run import Point, points
from benchmarks.learning.summary import crossing, summary
from tests.support.paths import ROOT
from treepo.config.load import load_config
from treepo.data.prompts import load_prompts
from treepo.rewards.custom import call, load_function
from treepo.rewards.grade import GradeItem
from treepo.toy.byte_tokenizer import byte_tokenizer
from treepo.toy.problems import draw_problems
from treepo.toy.task import Task
from treepo.verdict import Verdict

MODULES = [task.module for task in TASKS.values()]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def drawn(task: Task[Any], number: int, seed: int = 0) -> list[Any]:
    return draw_problems(np.random.default_rng(seed), number, task.draw_problem)


@pytest.mark.parametrize("task", TASKS)
def test_a_solution_is_right_and_as_long_as_said(task: str) -> None:
    module, tokens = TASKS[task].module, TASKS[task].response_tokens
    problems = drawn(module, 300)
    assert all(module.is_correct(problem, problem.solution()) for problem in problems)
    assert {len(problem.solution()) for problem in problems} == {tokens - 1}  # and the end token
    assert len({len(problem.text) for problem in problems}) == 1


@pytest.mark.parametrize("task", TASKS)
def test_demonstrations_are_as_long_as_solutions_and_sometimes_wrong(task: str) -> None:
    module, rng = TASKS[task].module, np.random.default_rng(0)
    found = [(problem, module.demonstrate(problem, rng)) for problem in drawn(module, 500)]
    assert {len(response) for _, response in found} == {TASKS[task].response_tokens - 1}
    right = np.mean([module.is_correct(problem, response) for problem, response in found])
    assert 0.2 < right < 0.8


@pytest.mark.parametrize("module", MODULES)
def test_rows_are_a_function_of_the_seed(module: Task[Any]) -> None:
    assert drawn(module, 40) == drawn(module, 40)
    assert drawn(module, 40) != drawn(module, 40, seed=1)
    assert list(module.rows(drawn(module, 40), "train")) == list(module.rows(drawn(module, 40), "train"))


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_is_drawn_twice_for_training_and_heldout_rows(task: str) -> None:
    """make_toy divides what it has drawn, so the rows of the two files are disjoint if no text repeats."""
    recipe = TASKS[task].starting
    problems = drawn(TASKS[task].module, recipe.train_problems + recipe.heldout_problems)
    assert len({problem.text for problem in problems}) == len(problems)


def test_a_slip_in_a_sum_makes_the_answer_wrong_by_as_much() -> None:
    rng = np.random.default_rng(0)
    for problem in drawn(sums, 200):
        response = sums.demonstrate(problem, rng)
        lines = response.splitlines()[:-1]
        slips = [int(line[5:]) - int(line[:2]) - int(line[2:4]) for line in lines]
        boxed = int(response[-3:-1])
        assert boxed == problem.answer + sum(slips)
        assert sums.is_correct(problem, response) == (sum(slips) == 0)


PROBLEM = search.Problem(36, (7, 5, 9), 33)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("36-7=29\n29-5=24\n24+9=33\n", True),
        ("36+9=45\n45-7=38\n38-5=33", True),  # in another order, without the last line break
        ("36+7=43\n43-5=38\n38-9=29\n", False),  # another number
        ("36-7=29\n29-5=24\n24+9=34\n", False),  # a line that is not true
        ("36-7=29\n30-5=25\n25+9=34\n", False),  # does not go on from the line before
        ("36-3=33\n", False),  # a number that is not given
        ("36-7=29\n29-5=24\n24+9=33\n33+9=42\n42-9=33\n", False),  # a number twice
        ("36-7=29\n29+4=33\n", False),
        ("36-7=29\n29-5=24\n24+9=33\nthat is it\n", False),
        ("", False),
    ],
)
def test_the_search_is_graded_by_evaluating_its_lines(response: str, right: bool) -> None:
    assert search.is_correct(PROBLEM, response) is right


def test_a_row_of_the_search_is_graded_as_training_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) for row in search.rows([PROBLEM], "train")))
    data = load_config(Path(CONFIG), [*overrides("search", BASELINE), f"data.train={path}"]).data
    (prompt,) = load_prompts(path, data.columns, byte_tokenizer(4096), data)
    function = load_function("benchmarks.learning.search:reward")
    for response, verdict in (("36-7=29\n29-5=24\n24+9=33\n", Verdict.CORRECT), ("36\n", Verdict.WRONG)):
        item = GradeItem(response, prompt.answer, prompt=prompt.text, extra=prompt.extra)
        assert call(function, item).verdict is verdict


@given(st.integers(10, 99), st.lists(st.integers(1, 9), max_size=5))
def test_what_is_reachable_is_what_some_signs_reach(start: int, numbers: list[int]) -> None:
    ends = set()
    for signs in itertools.product((-1, 1), repeat=len(numbers)):
        totals = start + np.cumsum([0, *(sign * number for sign, number in zip(signs, numbers, strict=True))])
        if totals.min() >= 10 and totals.max() <= 99:
            ends.add(int(totals[-1]))
    assert search.reachable(start, numbers) == ends


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_decodes_the_budget(task: str, arm: str) -> None:
    chosen = overrides(task, arm)
    load_config(ROOT / CONFIG, chosen)
    prompts = int(chosen[-1].removeprefix("data.prompts_per_step="))
    tree = tokens_a_tree(task, arm) * ARMS[arm].more.get(task, 1.0)
    assert abs(prompts * tree - TASKS[task].budget) <= tree / 2
    assert prompts * tree == pytest.approx(TASKS[task].budget, rel=0.035)


def test_a_sequential_tree_decodes_all_tokens_of_its_answers() -> None:
    assert tokens_a_tree("sums", BASELINE) == 8 * TASKS["sums"].response_tokens


def lines(tokens: int, accuracies: list[float]) -> list[dict]:
    """A metrics.jsonl that is evaluated before training and after each step."""
    step = {"rollout/decoded_tokens": tokens, "train/unique_tokens": 70, "trees/informative": 0.5}
    step |= dict.fromkeys(("seconds/step", "seconds/sample", "seconds/log_probs"), 1.0)
    step |= dict.fromkeys(("seconds/train", "seconds/weight_sync"), 0.5)
    evaluated = [{"heldout/accuracy": each, "heldout/standard_error": 0.01} for each in accuracies]
    return [evaluated[0], *(one for each in evaluated[1:] for one in (step, each))]


def test_a_run_becomes_its_evaluations() -> None:
    first, second = points("sums", "treepo", 3, lines(100, [0.2, 0.5]))
    assert first == Point("sums", "treepo", 3, 0, 0, 0, 0.0, 0.2, 0.01, None)
    assert second == Point("sums", "treepo", 3, 1, 100, 70, 3.0, 0.5, 0.01, 0.5)


def test_the_summary_compares_tokens_at_the_baselines_last_accuracy() -> None:
    runs = [
        *points("sums", BASELINE, 1, lines(100, [0.2, 0.4, 0.5])),
        *points("sums", BASELINE, 2, lines(100, [0.2, 0.4, 0.7])),
        *points("sums", "fast", 1, lines(100, [0.2, 0.6, 0.8])),
        *points("sums", "fast", 2, lines(100, [0.2, 0.6, 0.8])),
        *points("sums", "slow", 1, lines(80, [0.2, 0.3, 0.4])),
    ]
    baseline, fast, slow = (orjson.loads(orjson.dumps(line)) for line in summary(runs))
    assert baseline["target"] == fast["target"] == 0.6
    assert (baseline["tokens_to"], fast["tokens_to"], slow["tokens_to"]) == (200, 100, None)
    assert baseline["tokens_over_baseline"]["ratio"] == 1
    assert fast["tokens_over_baseline"]["ratio"] == 0.5
    assert fast["seconds_to"] == 3
    # The baseline's seeds end at 0.5 or 0.7, which the fast curve reaches after 3/4 and 3/2 of a step.
    assert fast["tokens_over_baseline"]["low"] == pytest.approx(0.375)
    assert fast["tokens_over_baseline"]["high"] == pytest.approx(0.75)
    assert slow["tokens_over_baseline"] == {"ratio": None, "low": None, "high": None}
    assert slow["accuracy"] == {"mean": 0.4, "low": None, "high": None}
    # Student's interval of two values is 12.71 standard errors to each side.
    assert baseline["accuracy"]["high"] == pytest.approx(0.6 + 12.706 * 0.1, abs=1e-3)
    assert (baseline["tokens_a_step"], slow["tokens_a_step"]) == (100, 80)
    assert [line["tokens_to"] for line in summary(runs, reached=0.3)] == [50, 25, 80]


def test_a_crossing_is_the_first_one() -> None:
    along = np.array([0.0, 10.0, 20.0, 30.0])
    accuracy = np.array([0.2, 0.6, 0.4, 0.8])
    assert crossing(along, accuracy, 0.4) == pytest.approx(5)
    assert crossing(along, accuracy, 0.1) == 0
    assert crossing(along, accuracy, 0.9) == float("inf")
