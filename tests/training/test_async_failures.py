"""What fails while trees grow: trees, engines, graders, the trainer, and the run itself."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.training_runs import (
    ALONE,
    ASYNC,
    NOTHING_UNAWAITED,
    OVERSAMPLE,
    LengthRewards,
    Run,
    check_every_prompt_was_taken_once,
    config_of,
    prompts_of,
    slow_engine,
    slow_trainer,
    steps_of,
    trees_of,
    use_rewards,
)
from treepo.errors import EngineError, RewardError
from treepo.protocols import GenerateRequest
from treepo.rewards.grade import Grade, GradeItem
from treepo.training import heldout
from treepo.tree import Verdict

pytestmark = [pytest.mark.usefixtures("graded"), NOTHING_UNAWAITED]


@pytest.mark.parametrize("changes", [{}, OVERSAMPLE, ASYNC])
def test_another_prompt_replaces_a_failed_tree(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every request of two prompts fails. In all more trees fail than may fail one after another."""
    config = config_of(folder, tmp_path / "run", steps=10, **ALONE, **changes)
    engine = slow_engine()
    bad: set[bytes] = set()

    def fails(number: int, request: GenerateRequest) -> bool:
        prompt = prompts_of([request])[0]
        if number > 100 and len(bad) < 2:
            bad.add(prompt)
        return prompt in bad

    engine.fails = fails
    Run(config, engine=engine).train()
    metrics = steps_of(config.out)
    assert sum(line["rollout/failed_trees"] for line in metrics) >= 4
    assert all(sum(step == each for step, _ in trees_of(config.out)) == 4 for each in range(1, 11))
    check_every_prompt_was_taken_once(config)


@pytest.mark.parametrize("changes", [{}, OVERSAMPLE, ASYNC])
@pytest.mark.parametrize("after", [0, 400])
def test_if_all_requests_fail_one_line_says_so(
    folder: Path, tmp_path: Path, changes: dict[str, Any], after: int
) -> None:
    config = config_of(folder, tmp_path / "run", steps=50, **ALONE, **changes)
    engine = slow_engine(fails=lambda number, _: number > after)
    with pytest.raises(EngineError, match=r"no tree could be sampled; the last: .*\(attempt 4 of 4\)"):
        Run(config, engine=engine).train()


@pytest.mark.parametrize("changes", [{}, OVERSAMPLE, ASYNC])
def test_ungraded_responses_are_masked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    use_rewards(monkeypatch, SomeTimeouts())
    config = config_of(folder, tmp_path / "run", steps=4, reward={"max_failed_share": 1.0}, **changes)
    Run(config, engine=slow_engine()).train()
    for line in steps_of(config.out):
        assert 0 < line["leaves_ungraded"] < line["leaves"] == 16
    check_every_prompt_was_taken_once(config)


class SomeTimeouts(LengthRewards):
    def _grade(self, item: GradeItem) -> Grade:
        return Grade(None, Verdict.TIMEOUT) if len(item.response) % 3 == 0 else super()._grade(item)


def test_an_error_of_the_grader_while_the_trainer_trains_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that is being trained is finished first."""
    rewards = FailsInTraining()
    use_rewards(monkeypatch, rewards)
    config = config_of(folder, tmp_path / "run", steps=9, **ASYNC)
    run = Run(config, engine=slow_engine(), trainer=slow_trainer(2000))
    run.trainer.before = lambda name: rewards.training.append(name) if name == "train_batch" else None
    with pytest.raises(RewardError, match="the reward function is broken"):
        run.train()
    assert run.seen.steps == [1]


class FailsInTraining(LengthRewards):
    def __init__(self) -> None:
        super().__init__()
        self.training: list[str] = []

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        if self.training:
            raise RewardError("the reward function is broken")
        return await super().grade(items)


@pytest.mark.parametrize("changes", [{}, OVERSAMPLE, ASYNC])
def test_a_gradient_that_is_not_finite_ends_the_run(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_of(folder, tmp_path / "run", steps=9, evaluation={"every": 1}, **changes)
    run = Run(config, engine=slow_engine())
    calls: list[str] = []

    def fail(name: str) -> None:
        calls.append(name)
        if calls.count("train_batch") == 3:
            raise FloatingPointError("gradient norm nan")

    run.trainer.before = fail
    with pytest.raises(FloatingPointError):
        run.train()
    assert run.seen.steps == [1, 2]


@pytest.mark.parametrize("changes", [{}, OVERSAMPLE, ASYNC])
@pytest.mark.parametrize("seed", range(3))
def test_an_interrupted_run_leaves_nothing_behind(
    folder: Path, tmp_path: Path, changes: dict[str, Any], seed: int
) -> None:
    turns = random.Random(seed).randrange(1500)
    config = config_of(folder, tmp_path / "run", steps=1000, evaluation={"every": 2}, **changes)
    run = Run(config, engine=slow_engine(), trainer=slow_trainer(30), killed_after=turns)
    with pytest.raises(asyncio.CancelledError):
        run.train()


def test_an_evaluation_that_no_engine_answers_is_given_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restarted engine serves only after the weight sync, which waits for the evaluation."""
    monkeypatch.setattr(heldout, "_POLL_SECONDS", 0.01)
    evaluation = {"every": 2, "temperature": 0.5}
    config = config_of(folder, tmp_path / "run", steps=6, evaluation=evaluation, **ASYNC)
    engine = slow_engine()
    run = Run(config, engine=engine, trainer=slow_trainer(5))

    def stalls(request: GenerateRequest) -> bool:
        lost = "sync 2" in run.events and "sync 3" not in run.events
        engine.status = "down: killed" if lost else "serving"
        return lost and request.temperature == 0.5

    engine.stalls = stalls
    run.train()
    assert run.seen.steps == [1, 2, 3, 4, 5, 6]
    assert list(run.seen.accuracies) == [0, 4, 6]
