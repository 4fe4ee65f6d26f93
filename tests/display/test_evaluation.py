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
    results = document(config_of("out", 2, ("easy", "hard")), benchmarks)
    console, output = plain_console()
    show_evaluation(console, results, Path("out"))
    rows = {line.split()[0]: line.split()[1:] for line in output.getvalue().splitlines() if line.strip()}
    assert rows["easy"][:2] == ["2/2", "75.0"]  # problems, mean@2
    assert rows["hard"][:2] == ["2/2", "50.0"]
    assert rows["easy"][-1] == "0"  # ungraded
    assert rows["hard"][-1] == "1"
    assert "all" in rows


def test_a_comparison_shows_both_means_and_their_difference() -> None:
    first, second = (
        document(
            config_of("out", 2), {"b": [(prompt_of("b", 0), graded_problem(prompt_of("b", 0), verdicts))]}
        )
        for verdicts in ([C, W], [C, C])
    )
    console, output = plain_console()
    show_comparison(console, "one", "two", compare(first, second))
    mean = next(line for line in map(str.split, output.getvalue().splitlines()) if "mean" in line)
    assert mean[:6] == ["b", "mean", "1", "50.0", "100.0", "+50.0"]
