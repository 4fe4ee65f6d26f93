"""The terminal output of `treepo eval`: tables and progress where nothing can be redrawn."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.evaluations import config_of, document, graded_problem, prompt_of
from treepo.display.comparison import show_comparison
from treepo.display.evaluation import show_evaluation
from treepo.display.live import LiveDisplay
from treepo.display.safe_console import SafeConsole
from treepo.evaluation.comparison import compare
from treepo.tree import Verdict

C, W, T = Verdict.CORRECT, Verdict.WRONG, Verdict.TIMEOUT


def plain_console() -> tuple[Console, StringIO]:
    """A console that is no terminal, and its output."""
    output = StringIO()
    return SafeConsole(file=output, width=200), output


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (7, 7), (10, 10), (25, 10), (1000, 10)])
def test_without_a_terminal_progress_is_a_line_every_tenth_and_the_last_is_the_end(
    total: int, lines: int
) -> None:
    console, output = plain_console()
    display = LiveDisplay(console, "title")
    for done in range(1, total + 1):
        display.line_every_tenth(done, total, f"{done} of {total}")
    printed = output.getvalue().splitlines()
    assert len(printed) == lines
    assert printed[-1] == f"{total} of {total}"


def test_tables_show_the_scores_of_the_document() -> None:
    benchmarks = {
        name: [
            (prompt, graded_problem(prompt, verdicts))
            for index, verdicts in enumerate(problems)
            for prompt in [prompt_of(name, index)]
        ]
        for name, problems in {"easy": [[C, C], [C, W]], "hard": [[W, W], [C, T]]}.items()
    }
    config = config_of("out", 2, ("easy", "hard"), sampling={"width": 2, "top_p": 0.9, "top_k": 20})
    console, output = plain_console()
    show_evaluation(console, document(config, benchmarks), Path("out"))
    how, *lines = output.getvalue().splitlines()
    assert how == (
        "2 independent samples for each problem · temperature 0.6 · top_p 0.9 · top_k 20 · up to 16384 tokens"
    )
    rows = [line.split() for line in lines if line.strip()]
    scores, verdicts = ({row[0]: row[1:] for row in part} for part in (rows[:9], rows[9:]))
    assert scores["easy"][:2] == ["2/2", "75.0"]  # problems, mean@2
    assert scores["hard"][:2] == ["2/2", "50.0"]
    assert verdicts["easy"] == ["4", "75.0", "25.0", "0.0", "0.0", "0.0"]
    assert verdicts["hard"] == ["4", "25.0", "50.0", "0.0", "25.0", "0.0"]
    assert "all" in verdicts


def test_most_responses_without_an_answer_are_a_line_below_the_tables() -> None:
    prompt = prompt_of("b", 0)
    none = graded_problem(prompt, [Verdict.NO_ANSWER, Verdict.NO_ANSWER])
    console, output = plain_console()
    show_evaluation(console, document(config_of("out", 2), {"b": [(prompt, none)]}), Path("out"))
    assert "2 of 2 responses have no answer: the last \\boxed{...}; reward.answer=" in output.getvalue()


def test_a_comparison_shows_both_means_and_their_difference() -> None:
    first, second = (
        document(
            config_of("out", 2), {"b": [(prompt_of("b", 0), graded_problem(prompt_of("b", 0), verdicts))]}
        )
        for verdicts in ([C, W], [C, C])
    )
    console, output = plain_console()
    show_comparison(console, "one", "two", compare(first, second), "not alike")
    assert "not alike" in output.getvalue()
    mean = next(line for line in map(str.split, output.getvalue().splitlines()) if "mean" in line)
    assert mean[:6] == ["b", "mean", "1", "50.0", "100.0", "+50.0"]
