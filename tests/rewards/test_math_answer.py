"""Grading of mathematics: what counts as equal, and agreement with real benchmarks and real verdicts."""

import asyncio
import json
import random

import pytest

from benchmarks.rewards import draw_items, grade_all
from tests.support.paths import SHARED
from tests.support.utf8_tokenizer import Utf8Tokenizer
from treepo.config.data import DataConfig
from treepo.data.prompts import load_prompts
from treepo.rewards import math_answer
from treepo.rewards.grade import Grade, GradeItem
from treepo.rewards.math_answer import equal_answers, grade_math
from treepo.rewards.pool import RewardPool
from treepo.rewards.worker import Exhaustion, grade
from treepo.tree import Verdict

DATA = SHARED / "data" / "math"
BENCHMARKS = {"aime24": 30, "amc23": 40, "minerva_math": 272, "olympiadbench": 675, "gsm8k": 1319}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent")


@pytest.mark.parametrize(
    ("gold", "other"),
    [
        ("0.5", r"\frac{1}{2}"),
        ("1/2", r"\dfrac12"),
        ("70000", "70,000"),
        ("18", r"\$18"),
        ("5", r"5 \text{ cm}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\frac{1}{3}", "0.333333"),
        ("1,3", r"\{3, 1\}"),
        ("5", "x=5"),
        (r"\text{Evelyn}", "Evelyn "),
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("4.5e33", r"45 \cdot 10^{32}"),
        (r"2e-3", "2e - 3"),
        ("7", "7."),
        ("-1/3", "-1./3"),
        ("x+2", "2 + x."),
        ("1,200", "1200,"),
        ("6.5e-2", "0.065"),
        (r"7.4 \times 10^{-12}", "7.4e-12"),
        ("1e-8", "0.00000001"),
        ("$n^{2}-n-1$", "n^2 - n - 1"),
        (r"\frac{1}{0}", r"\frac{1}{0}"),
    ],
)
def test_equal(gold: str, other: str) -> None:
    assert equal_answers(gold, other)


@pytest.mark.parametrize(
    ("gold", "other"),
    [
        ("0.5", "0.51"),
        ("(1,2)", "(2,1)"),
        ("4.5e33", r"4.51 \times 10^{33}"),
        ("4.5e33", "4.5"),
        ("1e-8", "0"),
        ("1e-8", "0.0"),
        ("1e-8", "0.00000002"),
        ("1e-400", "0.5"),
        ("10^{400}", "10^{400}+1"),
        ("2", "2.0000009"),
        ("x+1", "x-1"),
        ("5", ""),
        ("5", "five"),
        ("5", r"\frac{5}{0}"),
    ],
)
def test_not_equal(gold: str, other: str) -> None:
    assert not equal_answers(gold, other)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"first \boxed{1}, no: \boxed{2}", (Verdict.CORRECT, "2")),
        (r"\boxed{\frac{4}{\frac{2}{1}}}", (Verdict.CORRECT, r"\frac{4}{\frac{2}{1}}")),
        (r"\boxed {2}", (Verdict.CORRECT, "2")),
        (r"\fbox{2}", (Verdict.CORRECT, "2")),
        (r"\fbox {\frac{4}{2}}", (Verdict.CORRECT, r"\frac{4}{2}")),
        (r"\boxed{2}, as asked in \boxed{}", (Verdict.CORRECT, "2")),
        (r"\boxed{2} but then \boxed{3}", (Verdict.WRONG, "3")),
        ("the answer is 2", (Verdict.NO_ANSWER, None)),
        (r"\boxed{ }", (Verdict.NO_ANSWER, None)),
        ("", (Verdict.NO_ANSWER, None)),
    ],
)
def test_the_last_box_is_graded(response: str, expected: tuple[Verdict, str | None]) -> None:
    assert grade_math(response, "2") == expected


def test_an_exception_in_a_comparison_is_never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bool:
        raise ArithmeticError("broken")

    monkeypatch.setattr(math_answer, "verify", broken)
    with pytest.raises(ArithmeticError, match="broken"):
        equal_answers("1", "2")
    assert equal_answers("1", " 1")  # needs no comparison


def test_a_swallowed_lack_of_memory_or_stack_is_never_wrong() -> None:
    def swallow(error: Exception) -> Grade:
        try:
            raise error
        except Exception:
            return Grade(None, Verdict.WRONG, "7")

    with Exhaustion() as exhaustion:
        item = GradeItem("", "")
        for error in (MemoryError(), RecursionError()):
            result, _ = grade(lambda _, error=error: swallow(error), item, exhaustion)
            assert result.verdict is Verdict.ERROR
            assert result.message is not None
            assert type(error).__name__ in result.message
        result, _ = grade(lambda _: swallow(ValueError()), item, exhaustion)
        assert result.verdict is Verdict.WRONG


def gold_answers() -> list[str]:
    answers = []
    for name, size in BENCHMARKS.items():
        path = DATA / f"{name}.jsonl"
        config = DataConfig.model_validate({"train": path, "columns": name, "max_prompt_tokens": 10_000})
        found = [prompt.answer for prompt in load_prompts(path, config.columns, Utf8Tokenizer(), config)]
        assert len(found) == size
        answers += found
    return answers


def verdicts(pool: RewardPool, items: list[GradeItem]) -> list[Verdict]:
    return [result.verdict for result in asyncio.run(pool.grade(items))]


def check_gold_answers(pool: RewardPool, answers: list[str]) -> None:
    """Each is correct as it is, and with another text, so that math-verify has to compare."""
    for response in (r"\boxed{%s}", r"\boxed{\displaystyle %s}"):
        result = verdicts(pool, [GradeItem(response.replace("%s", answer), answer) for answer in answers])
        assert [answer for answer, verdict in zip(answers, result, strict=True) if verdict != "correct"] == []


@needs_data
def test_a_sample_of_gold_answers_is_correct(math_pool: RewardPool) -> None:
    check_gold_answers(math_pool, random.Random(0).sample(gold_answers(), 60))


@needs_data
@pytest.mark.slow
def test_every_gold_answer_is_correct(math_pool: RewardPool) -> None:
    answers = gold_answers()
    assert len(answers) == 2336
    check_gold_answers(math_pool, answers)


@needs_data
def test_agreement_with_another_grader_on_a_models_completions(math_pool: RewardPool) -> None:
    rows = [json.loads(line) for line in (DATA / "graded_completions.jsonl").read_text().splitlines()]
    items = [GradeItem(text, row["ground_truth"]) for row in rows for text in row["completions"]]
    expected = [bool(correct) for row in rows for correct in row["correct"]]
    agreed = [
        (verdict is Verdict.CORRECT) == correct
        for verdict, correct in zip(verdicts(math_pool, items), expected, strict=True)
    ]
    assert len(agreed) == 160
    assert sum(agreed) >= 159


def test_the_benchmark_counts_its_own_grades(math_pool: RewardPool) -> None:
    """Its items are half right, half wrong, of every kind; it asserts the verdicts itself."""
    cost = asyncio.run(grade_all(math_pool, draw_items(20)))
    assert min(cost.seconds, cost.own_seconds) > 0
