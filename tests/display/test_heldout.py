"""How the terminal shows evaluations, and what a finished run came to."""

from io import StringIO
from pathlib import Path

from rich.console import Console

from tests.support.run_folders import write_run_folder
from treepo.display.heldout import accuracies
from treepo.display.status import show_status
from treepo.display.train import TrainDisplay
from treepo.run_status import read_status


def console() -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=200), text


def test_a_set_is_named_unless_it_is_alone() -> None:
    alone = {"heldout/accuracy": 0.25, "heldout/standard_error": 0.05}
    assert list(accuracies(alone)) == ["0.250 ± 0.050"]
    assert list(accuracies(alone | {"heldout/math/accuracy": 0.5})) == ["heldout 0.250 ± 0.050", "math 0.500"]
    ungraded = {"heldout/math/accuracy": float("nan"), "heldout/math/standard_error": float("nan")}
    assert list(accuracies(ungraded)) == ["math no answer could be graded"]


def test_an_evaluation_is_a_line_that_says_whether_it_is_the_best_so_far() -> None:
    plain, text = console()
    with TrainDisplay(plain, "title", steps=4) as display:
        display.evaluated(0, {"heldout/accuracy": 0.25})
        display.evaluated(2, {"heldout/accuracy": 0.5, "heldout/best_step": 2})
        display.evaluated(4, {"heldout/accuracy": 0.4, "heldout/best_step": 2})
    assert text.getvalue().splitlines()[1:] == [
        "held-out accuracy before training: 0.250",
        "held-out accuracy after step 2: 0.500, the best so far",
        "held-out accuracy after step 4: 0.400",
    ]


def test_the_status_of_a_finished_run_ends_with_its_conclusion(tmp_path: Path) -> None:
    evaluation = {"step": 2, "metrics": {"heldout/math/accuracy": 0.5, "heldout/best_step": 2}}
    warnings = [{"rule": rule, "step": 2, "text": f"the remedy of {rule}"} for rule in ("first", "second")]
    run = write_run_folder(tmp_path / "run", evaluation=evaluation, warnings=warnings)
    plain, text = console()
    show_status(plain, run, read_status(run), ("one", "two", "three"))
    shown = [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]
    assert "held-out accuracy after step 2 math 0.500" in shown
    assert "best step so far 2" in shown
    assert [line for line in shown if "remedy" in line] == ["warning after step 2: the remedy of second"]
    assert shown[-3:] == ["one", "two", "three"]
