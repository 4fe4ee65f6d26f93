r"""What counts as the answer of a response, on phrasings that people and models write."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support.paths import SHARED
from treepo.config.reward import RewardConfig
from treepo.rewards.extraction import BOXED_OR_LAST, described, extract
from treepo.rewards.grade import GradeItem
from treepo.rewards.math_answer import equal_answers, grade_math
from treepo.rewards.pool import RewardPool
from treepo.rollout.boxed import last_boxed
from treepo.tree import Verdict

COMPLETIONS = SHARED / "data" / "math" / "graded_completions.jsonl"

STATED = {
    # the phrase
    "The answer is 42.": "42",
    "the answer is: 42": "42",
    "So the final answer is **42**.": "42",
    "**Answer:** 42": "42",
    "**Answer**: 42": "42",
    "ANSWER: 42": "42",
    "Answer = 42": "42",
    "The answer to the question is 42.": "42",
    "Therefore, the answer, in simplest form, is 7/8.": "7/8",
    "So the answer would be 42!": "42",
    "The answers are 2 and 3.": "2 and 3",
    "The answer is therefore about 42.": "42",
    "答案是42。": "42",
    "答案：\\(5\\)": "5",
    "The answer is:\n\n42": "42",
    "The answer is\n\\[\n42\n\\]\nDone.": "42",
    "The answer is:\n$$\\frac{3}{4}$$": "\\frac{3}{4}",
    "The answer is:\n- 42": "42",
    # formulas
    "The final answer is $\\frac{1}{2}$. I hope it is correct.": "\\frac{1}{2}",
    "Final Answer: The final answer is $\\pi$. I hope it is correct.": "\\pi",
    "The answer is \\(\\frac{3}{4}\\) of the cake.": "\\frac{3}{4}",
    "The answer is $x = 5$ and $y = 3$, as required.": "$x = 5$ and $y = 3$",
    "The answer is \\(x^2\\), not \\(x\\).": "x^2",
    "The answer is $50$%.": "$50$%",
    "The answer is x = 5.": "x = 5",
    "The answer is 2x + 3, where x is positive.": "2x + 3",
    "The answer is y = 2x + 1 for all x.": "y = 2x + 1",
    "The answer is 12 + 5 = 17.": "12 + 5 = 17",
    "The answer is (2, 3).": "(2, 3)",
    "The answer is [2, 5).": "[2, 5)",
    "The answer is {1, 2, 3}.": "{1, 2, 3}",
    "The answer is 1 < x < 3.": "1 < x < 3",
    "The answer is √2.": "√2",
    "The answer is \\frac{\\pi}{4}.": "\\frac{\\pi}{4}",
    "The answer is n(n+1)/2.": "n(n+1)/2",
    # numbers and their units
    "The answer is 1, 3, and 5.": "1, 3, and 5",
    "The answer is -5.": "-5",
    "The answer is −4.": "−4",
    "The answer is 3/4.": "3/4",
    "The answer is 1/2 of the total.": "1/2",
    "The answer is 1,200 dollars": "1,200 dollars",
    "The answer is 18 dollars every day.": "18 dollars every day",
    "The answer is $18 per day, because 9*2 = 18.": "$18",
    "The answer is $18 and not $20.": "$18",
    "The answer is **\\$7**.": "\\$7",
    "The answer is 60 km/h.": "60",
    "The answer is 60 miles per hour.": "60",
    "The answer is 24 cm^2.": "24 cm^2",
    "The answer is 7:30 p.m.": "7:30 p.m",
    "The answer is 3 hours and 20 minutes.": "3 hours and 20 minutes",
    "The answer is 3 \\times 10^8.": "3 \\times 10^8",
    "The answer is 1e-5.": "1e-5",
    "The answer is 5 million.": "5 million",
    "The answer is 5 or more.": "5 or more",
    "The answer is 10 dozen eggs.": "10 dozen eggs",
    "The answer is 12, i.e. a dozen.": "12",
    "The answer is 12 (since 3*4 = 12).": "12",
    "The answer is 4 because 2 + 2 = 4.": "4",
    # sentences and words
    "The answer is that he has 5 apples left.": "5",
    "The answer is the sum of 3 and 4, which is 7.": "7",
    "Answer: There are 12 eggs.": "12",
    "The answer is Evelyn.": "Evelyn",
    "The answer is Monday, because it comes first.": "Monday",
    "The answer is no, he cannot.": "no",
    "The answer is no solution.": "no solution",
    "The answer is (B) 12 apples.": "(B) 12 apples",
    "The correct answer is B.": "B",
    "The answer is option (C).": "(C)",
    # which statement
    "The answer is 41. No: the answer is 42.": "42",
    "The answer is 42. Let me know if the answer is wrong.": "42",
    "The answer is not 41. It is 42.": "42",
    "The answer is 42.\n\nQuestion: how many of 7?": "42",
    "We get 42. So the answer is:": "42",
    "The answer is 41, or rather \\boxed{42}.": "42",
    "\\boxed{42} is the answer. The answer is 41.": "42",
    "The answer is \\boxed{42": "42",
}

LAST_NUMBER = {
    "So he has 42 left.": "42",
    "10-5=5": "5",
    "He pays -$5.50": "-$5.50",
    "It was $1,234.56.": "$1,234.56",
    "It costs 12\\,345 won": "12\\,345",
    "It takes 1,00,000 rupees.": "1,00,000",
    "He ate 3/4 of it.": "3/4",
    "He ate $\\frac{3}{4}$ of it.": "\\frac{3}{4}",
    "He ate 1 1/2 cakes": "1 1/2",
    "The area is 24 cm^2.": "24",
    "In 3 × 10^5 ways.": "3 × 10^5",
    "There are 2^{10} of them.": "2^{10}",
    "The probability is 25%": "25%",
    "The ratio is 3:4, so": "3:4",
    "x_1 = 3, of CO2": "3",
    "1. We add 7.\n2. The sum is what we want.": "7",
    "It holds on 5/17/2020": "2020",
    "it is .5": ".5",
    "Between 3-5 people": "5",
    "### Answer\n\n42": "42",
}

NOTHING = [
    "",
    "Seven.",
    "The answer is",
    "Answer:",
    "I cannot say what the answer is.",
    "The answer is unclear.",
    "\\boxed{}",
    "1. Add.\n2. Multiply.",
]


@pytest.mark.parametrize(("response", "answer"), [*STATED.items(), *LAST_NUMBER.items()])
def test_what_is_boxed_stated_or_last(response: str, answer: str) -> None:
    assert extract(response, BOXED_OR_LAST) == answer
    assert extract(f"First 6 x 9 = 54.\n{response}", BOXED_OR_LAST) == answer


@pytest.mark.parametrize("response", NOTHING)
def test_nothing_to_extract_is_no_answer(response: str) -> None:
    assert extract(response, BOXED_OR_LAST) is None
    assert grade_math(response, "2", BOXED_OR_LAST) == (Verdict.NO_ANSWER, None)


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("18", "The answer is 18 dollars every day."),
        ("18", "The answer is $18 per day."),
        ("0.75", "He ate 3/4 of it."),
        ("1200", "The answer is 1,200 m."),
        ("B", "The answer is (B) 12 apples."),
        ("1,3,5", "The answer is 1, 3, and 5."),
        ("5", "The answer is x = 5."),
        ("17", "The answer is 12 + 5 = 17."),
        ("5000000", "The answer is 5 million."),
        ("7:30", "The answer is 7:30 p.m."),
        ("Evelyn", "The answer is evelyn."),
        ("-4", "The answer is −4."),
        (r"\frac{\pi}{4}", "The answer is π/4."),
    ],
)
def test_what_is_extracted_is_graded(gold: str, response: str) -> None:
    assert grade_math(response, gold, BOXED_OR_LAST)[0] is Verdict.CORRECT
    assert grade_math(response, gold)[0] is Verdict.NO_ANSWER
    assert (
        grade_math(response.replace("answer", "result") + " Or 1234.", gold, BOXED_OR_LAST)[0]
        is Verdict.WRONG
    )


@pytest.mark.parametrize(
    ("text", "response", "answer"),
    [
        ("#### ", "9 x 2 = 18\n#### 18", "18"),
        ("#### ", "####18", "18"),
        ("#### ", "#### 1\n#### -2\nDone: 3", "-2"),
        ("#### ", "####\n18 dollars", "18 dollars"),
        ("#### ", r"#### \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("#### ", "#### all of them are blue", "all of them are blue"),
        ("#### ", "the answer is 18", None),
        ("#### ", "####  \n ", None),
        ("<answer>", "<answer>18</answer> and 19", "18"),
        ("So: ", "So: 18 because of 20.", "18"),
    ],
)
def test_what_follows_a_text_of_the_users_own(text: str, response: str, answer: str | None) -> None:
    for rule in (f'after:"{text}"', f"after:{text}"):  # a shell takes the quotes
        assert extract(response, rule) == answer


@pytest.mark.parametrize("value", ["", "last", "after", "after:", 'after:""', "after:  ", "Boxed"])
def test_another_value_is_refused_with_those_that_are_allowed(value: str) -> None:
    with pytest.raises(ValidationError, match=r'should be one of boxed, boxed_or_last, after:"TEXT"'):
        RewardConfig(answer=value)


def test_an_answer_is_extracted_only_for_math_verify() -> None:
    with pytest.raises(ValidationError, match="answer = boxed_or_last, but function grades"):
        RewardConfig(answer=BOXED_OR_LAST, function="module:function")


def test_a_rule_is_described_for_a_report() -> None:
    assert described(RewardConfig().answer) == r"the last \boxed{...}"
    assert described('after:"#### "') == 'what follows the last "####"'


def test_the_grading_processes_follow_the_rule() -> None:
    responses = ["#### 18", r"\boxed{18}", "the answer is 18", "#### 19"]
    with RewardPool(RewardConfig(workers=1, deadline_seconds=60, answer='after:"#### "')) as pool:
        grades = asyncio.run(pool.grade([GradeItem(text, "18") for text in responses]))
    verdicts = [Verdict.CORRECT, Verdict.NO_ANSWER, Verdict.NO_ANSWER, Verdict.WRONG]
    assert [grade.verdict for grade in grades] == verdicts
    assert [grade.answer_text for grade in grades] == ["18", None, None, "19"]


def without_boxes(text: str) -> str:
    """The text with the contents of its boxes in place of them."""
    while (inside := last_boxed(text)) is not None:
        at = text.rfind("{" + inside + "}")
        box = max(text.rfind(r"\boxed", 0, at), text.rfind(r"\fbox", 0, at))
        text = text[:box] + inside + text[at + len(inside) + 2 :]
    return text


@pytest.mark.skipif(not COMPLETIONS.is_file(), reason=f"{COMPLETIONS} is absent")
def test_a_models_completions_without_their_boxes_get_the_same_verdicts() -> None:
    rows = [json.loads(line) for line in COMPLETIONS.read_text().splitlines()]
    for row in rows:
        for text, correct in zip(row["completions"], row["correct"], strict=True):
            answer = extract(without_boxes(text), BOXED_OR_LAST)
            assert answer is not None
            assert equal_answers(row["ground_truth"], answer) == bool(correct)


PIECES = [
    "the answer is ",
    "answer: ",
    "12",
    "1,",
    "-",
    "$",
    "\\(",
    "\\frac{1}",
    "{",
    " ",
    "\n",
    "x^",
    "a",
    ". ",
]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_an_answer_is_a_piece_of_the_response(text: str) -> None:
    for rule in (BOXED_OR_LAST, "after:answer"):
        answer = extract(text, rule)
        assert answer is None or (answer and answer == answer.strip() and answer in text)


@pytest.mark.parametrize(
    "piece", [*PIECES, "answer to ", "*", "#", "1/", "1:", "(the answer is wrong) ", "\\times 10"]
)
def test_a_long_response_is_read_in_linear_time(piece: str) -> None:
    """A quadratic pattern would take a minute here."""
    extract(f"answer{piece * (40_000 // len(piece))}", BOXED_OR_LAST)
