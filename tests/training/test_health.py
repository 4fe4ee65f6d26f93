"""Health rules: each warns of its trouble, once, and of no other; a healthy run has no warning."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.training_runs import LengthRewards, Run, config_of, steps_of, use_rewards
from treepo.config.run import RunConfig
from treepo.rewards.grade import Grade, GradeItem
from treepo.run_status import read_status
from treepo.training.health import RULES, Health
from treepo.training.pace import Pace, PaceMeter
from treepo.tree import Verdict

HEALTHY = {
    "trees/informative": 0.5,
    "accuracy": 0.4,
    "stop/limit": 0.1,
    "stop/depth": 0.0,
    "verdict/no_answer": 0.1,
    "verdict/timeout": 0.0,
    "verdict/error": 0.0,
    "logprob_difference_mean": 0.005,
    "train/entropy": 0.5,
    "train/effective_sample_share": 0.9,
    "rollout/fallbacks": 2.0,
    "rollout/branchings": 20.0,
    "total_over_unique": 1.6,
    "tokens_unique": 1000.0,
    "seconds/step": 10.0,
}
TROUBLES: dict[str, dict[str, float]] = {
    "no_signal": {"trees/informative": 0.0},
    "truncated": {"stop/limit": 0.5, "stop/depth": 0.46},
    "no_answer": {"verdict/no_answer": 0.85},
    "log_prob_difference": {"logprob_difference_mean": 0.02},
    "entropy_collapse": {"train/entropy": 0.04},
    "fallbacks": {"rollout/branchings": 0.0},
    "little_sharing": {"total_over_unique": 1.0},
    "grader_timeouts": {"verdict/timeout": 0.03},
    "grader_errors": {"verdict/error": 0.03},
    "few_tokens_teach": {"train/effective_sample_share": 0.1},
    "slower": {"seconds/step": 16.0},
}


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> RunConfig:
    return config_of(folder, tmp_path / "run", steps=100)


def warnings(config: RunConfig, *parts: tuple[int, dict[str, Any]]) -> list[str]:
    """The rules that warn in a run of these steps: pairs of a number of steps and what differs in them."""
    health, step = Health(config), 0
    for steps, changes in parts:
        for _ in range(steps):
            step += 1
            health.step(step, HEALTHY | changes)
    return [warning.rule for warning in health.warnings]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_warns_once_of_its_trouble_alone(config: RunConfig, name: str) -> None:
    assert warnings(config, (20, {}), (40, TROUBLES[name])) == [name]


@pytest.mark.parametrize("name", RULES)
def test_a_step_or_two_are_no_reason(config: RunConfig, name: str) -> None:
    assert warnings(config, (20, {}), (2, TROUBLES[name]), (40, {})) == []


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_number_that_is_missing_warns_of_nothing(config: RunConfig, value: float | None) -> None:
    assert warnings(config, (40, dict.fromkeys(HEALTHY, value))) == []
    health = Health(config)
    for step in range(1, 41):
        assert health.step(step, {"seconds/step": 1.0}) == []


def test_a_low_entropy_is_right_for_a_model_that_answers_right(config: RunConfig) -> None:
    assert warnings(config, (10, {}), (20, {"train/entropy": 0.01, "accuracy": 0.97})) == []


def test_steps_whose_answers_grow_may_take_longer(config: RunConfig) -> None:
    assert warnings(config, (10, {}), (20, {"seconds/step": 25.0, "tokens_unique": 2000.0})) == []


def test_independent_samples_share_nothing_by_design(config: RunConfig) -> None:
    sampling = config.sampling.model_copy(update={"mode": "sequential"})
    alone = config.model_copy(update={"sampling": sampling})
    assert warnings(alone, (20, {"total_over_unique": 1.0, "rollout/branchings": 0.0})) == []


def test_a_resumed_run_repeats_no_warning_and_knows_its_first_steps(config: RunConfig) -> None:
    earlier = [{"step": step, "time": 1.0, **HEALTHY, "verdict/error": 0.5} for step in range(1, 11)]
    evaluation = {"step": 10, "time": 1.0, "heldout/accuracy": 0.5}
    health = Health(config, [*earlier, evaluation])
    assert [(warning.rule, warning.step) for warning in health.warnings] == [("grader_errors", 3)]
    found = [
        warning.rule
        for step in range(8, 20)
        for warning in health.step(step, HEALTHY | {"train/entropy": 0.01, "verdict/error": 0.5})
    ]
    assert found == ["entropy_collapse"]


def test_a_warning_names_keys_that_exist(config: RunConfig) -> None:
    known = set(_keys(config.model_dump(mode="json")))
    for name, trouble in TROUBLES.items():
        health = Health(config)
        for step in range(1, 60):
            health.step(step, HEALTHY | (trouble if step > 20 else {}))
        (warning,) = health.warnings
        assert "\n" not in warning.text
        sections = "|".join(RunConfig.model_fields)
        for key in re.findall(rf"\b(?:{sections})\.[\w.]*\w", warning.text):
            assert key in known, f"{name}: {key}"


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key and section."""
    found = []
    for name, value in values.items():
        found.append(prefix + name)
        if isinstance(value, dict):
            found += _keys(value, f"{prefix}{name}.")
    return found


def test_the_documentation_has_a_row_for_each_rule() -> None:
    page = (ROOT / "docs/following.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == list(RULES)


class NoRewards(LengthRewards):
    def _grade(self, item: GradeItem) -> Grade:
        del item
        return Grade(-1.0, Verdict.NO_ANSWER)


def test_a_run_says_it_in_the_log_and_in_its_status(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_rewards(monkeypatch, NoRewards())
    config = config_of(folder, tmp_path / "run", steps=6)
    Run(config).train()
    status = read_status(config.out)
    said_at = {warning.rule: warning.step for warning in status.warnings}
    assert (said_at["no_answer"], said_at["no_signal"]) == (3, 5)
    assert status.pace is not None
    assert status.pace.left_seconds == 0
    said = [line for line in caplog.messages if "no prompt had two answers with different rewards" in line]
    assert len(said) == 1
    assert said[0].startswith("step 5: ")
    assert said[0] in (config.out / "log.txt").read_text()
    assert steps_of(config.out)[-1]["trees/informative"] == 0.0


def test_the_pace_leaves_out_the_first_step_and_follows_the_newest() -> None:
    meter = PaceMeter(30)
    paces = [
        meter.step(step, {"seconds/step": seconds})
        for step, seconds in enumerate([60.0, *[10.0] * 10, *[12.0] * 10], start=1)
    ]
    assert paces[0] == Pace(60.0, None, 60.0 * 29)
    assert paces[10] == Pace(10.0, None, 190.0)
    assert paces[20] == Pace(12.0, 12.0 / 10.0 - 1, 108.0)
