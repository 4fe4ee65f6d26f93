"""What is said of a finished run, by its numbers: whether it learned, and where the numbers do not tell."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.run_folders import step, write_run_folder
from treepo.training.conclusion import conclusion, conclusion_of
from treepo.training.health import HealthWarning

RUN = Path("runs/a")


def evaluation(number: int, accuracy: float | None, error: float | None, name: str = "") -> dict[str, Any]:
    prefix = f"heldout/{name}/" if name else "heldout/"
    return {"step": number, f"{prefix}accuracy": accuracy, f"{prefix}standard_error": error}


def steps(*rewards: float | None) -> list[dict[str, Any]]:
    return [step(number, reward=reward) for number, reward in enumerate(rewards, start=1)]


RISING = steps(*(number / 20 for number in range(12)))


@pytest.mark.parametrize(
    ("before", "after", "error", "verdict"),
    [
        (0.38, 0.93, 0.02, "It learned: held-out accuracy went from 0.380 to 0.930 (+0.550 ± 0.028)."),
        (0.38, 0.30, 0.01, "It got worse: held-out accuracy went from 0.380 to 0.300 (-0.080 ± 0.014)."),
        (
            0.38,
            0.385,
            0.005,
            "It did not learn: held-out accuracy went from 0.380 to 0.385 (+0.005 ± 0.007).",
        ),
        (0.38, 0.42, 0.03, "Whether it learned cannot be told: held-out accuracy went from 0.380 to 0.420"),
        (0.38, 0.42, None, "Whether it learned cannot be told: held-out accuracy went from 0.380 to 0.420,"),
        (0.38, 0.38, 0.0, "It did not learn: "),
        (None, 0.42, 0.03, "Whether it learned cannot be told: there is no held-out accuracy of before and"),
    ],
)
def test_a_difference_counts_beyond_two_standard_errors(
    before: float | None, after: float, error: float | None, verdict: str
) -> None:
    records = [evaluation(0, before, error), *RISING, evaluation(12, after, error)]
    assert conclusion(records, (), RUN)[0].startswith(verdict)


def test_evaluations_between_do_not_count() -> None:
    records = [evaluation(0, 0.4, 0.01), evaluation(6, 0.9, 0.01), *RISING, evaluation(12, 0.4, 0.01)]
    assert conclusion(records, (), RUN)[0].startswith("It did not learn")


def test_each_set_is_named_and_one_may_rise_while_another_falls() -> None:
    def both(number: int, math: float, code: float) -> dict[str, Any]:
        return evaluation(number, math, 0.01, "math") | evaluation(number, code, 0.01, "code")

    line = conclusion([both(0, 0.2, 0.5), both(9, 0.6, 0.3)], (), RUN)[0]
    assert line == (
        "It learned one thing and lost another: held-out accuracy went from 0.200 to 0.600 (+0.400 ± 0.014) "
        "on math; from 0.500 to 0.300 (-0.200 ± 0.014) on code."
    )
    assert conclusion([both(0, 0.2, 0.5), both(9, 0.6, 0.51)], (), RUN)[0].startswith("It learned: ")


@pytest.mark.parametrize(
    ("rewards", "line"),
    [
        (
            [0.1, 0.2, 0.1, 0.8, 0.9, 0.8],
            "The training reward rose: 0.150 in the first 2 steps, 0.850 in the la",
        ),
        ([0.8, 0.9, 0.8, 0.2, 0.1, 0.2], "The training reward fell: "),
        ([0.1, 0.9, 0.1, 0.9, 0.3, 0.9], "The training reward did not change clearly: "),
        ([0.1, 0.9], "The training reward of 2 steps is too little to tell a trend."),
        ([None] * 9, "The training reward of 0 steps is too little to tell a trend."),
    ],
)
def test_the_reward_is_compared_by_its_spread(rewards: list[float | None], line: str) -> None:
    assert conclusion(steps(*rewards), (), RUN)[1].startswith(line)


def test_the_first_warning_and_a_better_step_are_named(tmp_path: Path) -> None:
    records = [evaluation(0, 0.3, 0.01), *RISING, evaluation(12, 0.6, 0.01) | {"heldout/best_step": 8}]
    warnings = [HealthWarning("slower", 5, "steps have become slower; see"), HealthWarning("other", 7, "x")]
    assert conclusion(records, warnings, tmp_path)[2] == (
        f"Look at: the warning after step 5, steps have become slower; see (and 1 more in "
        f"`treepo status {tmp_path}`); treepo view {tmp_path} (curves, and the answers themselves)"
    )
    (tmp_path / "best").mkdir()
    assert (
        f"{tmp_path}/best/, the model with the highest held-out accuracy, after step 8"
        in (conclusion(records, (), tmp_path)[2])
    )


def test_the_files_of_a_run_are_read(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run", warnings=[{"rule": "r", "step": 2, "text": "the remedy"}])
    lines = conclusion_of(run)
    assert lines[0].startswith("Whether it learned cannot be told: there is no held-out accuracy of before")
    assert "the warning after step 2, the remedy" in lines[2]
    (run / "status.json").unlink()
    assert "warning" not in conclusion_of(run)[2]
    assert conclusion_of(tmp_path) == ()
