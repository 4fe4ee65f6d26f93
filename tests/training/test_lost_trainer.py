"""The trainer dies at any of its calls: the run goes on by itself to the end that it would have had."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_trainer import FakeTrainer, NamedEngine
from tests.support.training_runs import (
    ALONE,
    ASYNC,
    NOTHING_UNAWAITED,
    OVERSAMPLE,
    VERY_ASYNC,
    Run,
    check_every_prompt_was_taken_once,
    config_of,
    lines,
    steps_of,
    trees_of,
    versions_of,
)
from treepo.config.run import RunConfig
from treepo.errors import LostTrainerError, TrainerError
from treepo.training import train as module

pytestmark = [pytest.mark.usefixtures("graded", "at_once"), NOTHING_UNAWAITED]
STEPS = 5
SYNC = {"evaluation": {"every": 1}}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACK_OFF_SECONDS", 0.0)


def run_of(config: RunConfig, *, resume: bool = False, turns: int = 20) -> Run:
    trainer = FakeTrainer()
    trainer.learns, trainer.turns = True, turns
    pace = 3 if config.loop.mode == "async" else 0
    return Run(config, resume, engine=NamedEngine(end=0.1, pace=pace), trainer=trainer)


def lost_at(run: Run, *moments: int) -> list[str]:
    """Lose the trainer at these moments, numbered from 1; returns the list of all moments, which grows.

    A call has a moment before it does anything and one when it is done.
    """
    names: list[str] = []

    def moment(kind: str) -> Callable[[str], None]:
        def happens(name: str) -> None:
            names.append(f"{kind} {name}")
            if len(names) in moments:
                raise LostTrainerError(f"the trainer lost rank 0 ({kind} {name})")

        return happens

    run.trainer.before, run.trainer.after = moment("before"), moment("after")
    return names


def moments_of(config: RunConfig) -> list[str]:
    """All moments of the run if nothing is lost."""
    run = run_of(config)
    names = lost_at(run)
    run.train()
    return names


def restarts_in(config: RunConfig) -> list[str]:
    """The lines of the log, which the terminal shows too, about restarts of the trainer."""
    log = (config.out / "log.txt").read_text().splitlines()
    return [
        line.partition(" WARNING treepo.training.train: ")[2] for line in log if "the run goes on" in line
    ]


TIMED = ("time", "tokens_per_second", "seconds", "idle/", "trainer_restarts")


def history(run: Run, summary: dict[str, Any]) -> list[Any]:
    """All that a run leaves, without what depends on the time that it took."""
    out = run.config.out
    metrics = [
        {name: value for name, value in line.items() if not any(word in name for word in TIMED)}
        for line in lines(out / "metrics.jsonl")
    ]
    told = {name: summary[name] for name in summary if not any(word in name for word in TIMED)}
    trees = [(out / name).read_bytes() for name in ("trees.jsonl", "heldout_trees.jsonl")]
    return [metrics, trees, told, run.trainer.weights, run.engine.weights]


@pytest.mark.parametrize(("every", "stride"), [(1, 5), (2, 1), (None, 5)])
def test_a_run_ends_as_if_its_trainer_had_not_been_lost(
    folder: Path, tmp_path: Path, every: int | None, stride: int
) -> None:
    """stride: of the moments; 1 for each one."""
    changes = SYNC | {"checkpoint": {"every": every}}
    straight = run_of(config_of(folder, tmp_path / "straight", 3, **changes))
    expected = history(straight, straight.train())
    moments = moments_of(config_of(folder, tmp_path / "all", 3, **changes))
    assert {"before send_weights", "after train_batch", "half of train_batch", "after export"} <= {
        name.replace("before half", "half") for name in moments
    }
    for moment, name in list(enumerate(moments, start=1))[::stride]:
        run = run_of(config_of(folder, tmp_path / str(moment), 3, **changes))
        lost_at(run, moment)
        summary = run.train()
        assert history(run, summary) == expected, name
        assert run.events.count("restart") == summary["trainer_restarts"] == 1, name
        assert not run.engine.refuses
        (line,) = restarts_in(run.config)
        assert name in line
        assert line.endswith("(restart 1 of 3)")


@pytest.mark.parametrize("second", [1, 2, 3, 8])
def test_a_trainer_may_be_lost_again_while_it_restarts_and_later(
    folder: Path, tmp_path: Path, second: int
) -> None:
    straight = run_of(config_of(folder, tmp_path / "straight", STEPS, **SYNC))
    expected = history(straight, straight.train())
    for first in (14, 23):
        run = run_of(config_of(folder, tmp_path / str(first), STEPS, **SYNC))
        lost_at(run, first, first + second, first + second + 1)
        summary = run.train()
        assert history(run, summary) == expected
        assert summary["trainer_restarts"] == 3


def test_steps_say_how_often_the_trainer_was_lost_before_them(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run", STEPS, **ALONE)
    moments = moments_of(config_of(folder, tmp_path / "straight", STEPS, **ALONE))
    fourth = [number for number, name in enumerate(moments, start=1) if name == "before train_batch"][3]
    run = run_of(config)
    lost_at(run, fourth)
    run.train()
    assert [line["trainer_restarts"] for line in steps_of(config.out)] == [0, 0, 1, 1, 1]
    assert restarts_in(config) == [
        "the trainer lost rank 0 (before train_batch); the run goes on after step 2 (restart 1 of 3)"
    ]


@pytest.mark.parametrize("most", [0, 2])
def test_restarts_are_bounded(folder: Path, tmp_path: Path, most: int) -> None:
    config = config_of(folder, tmp_path / "run", STEPS, trainer={"max_restarts": most}, **ALONE)
    run = run_of(config)

    def dies(name: str) -> None:
        if name == "train_batch" and "sync 3" in run.events:
            raise LostTrainerError("the trainer lost rank 0 (it died)")

    run.trainer.before = dies
    with pytest.raises(TrainerError) as failure:
        run.train()
    assert not isinstance(failure.value, LostTrainerError)
    assert str(failure.value) == (
        f"the trainer lost rank 0 (it died); trainer.max_restarts = {most}: all restarts are used up; "
        "--resume continues after step 2"
    )
    assert run.events.count("restart") == most
    resumed = run_of(config, resume=True)
    summary = resumed.train()
    assert summary["trainer_restarts"] == 0, "those that no checkpoint has counted are forgotten"
    assert [line["step"] for line in steps_of(config.out)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("mode", "every"), [(OVERSAMPLE, 2), (ASYNC, 1), (VERY_ASYNC, 2), (ASYNC, None)])
def test_an_asynchronous_run_trains_every_prompt_once(
    folder: Path, tmp_path: Path, mode: dict[str, Any], every: int | None
) -> None:
    changes = mode | {"checkpoint": {"every": every}, "evaluation": {"every": 2}}
    moments = moments_of(config_of(folder, tmp_path / "all", STEPS, **changes))
    for moment in range(1, len(moments) + 1, 6):
        config = config_of(folder, tmp_path / str(moment), STEPS, **changes)
        run = run_of(config)
        lost_at(run, moment)
        summary = run.train()
        assert summary["trainer_restarts"] == 1
        assert [line["step"] for line in steps_of(config.out)] == [1, 2, 3, 4, 5]
        evaluated = [
            line["step"] for line in lines(config.out / "metrics.jsonl") if "heldout/accuracy" in line
        ]
        assert evaluated == [0, 2, 4, 5]
        taken = [step for step, _ in trees_of(config.out)]
        assert taken == sorted(taken)
        assert len(taken) == 4 * STEPS
        for step, tree in trees_of(config.out):
            versions = versions_of(tree)
            assert step - 1 - config.loop.max_staleness <= versions[0] <= versions[-1] <= step - 1
        assert run.engine.version == STEPS
        assert run.engine.weights == run.trainer.weights
        if every is not None:
            check_every_prompt_was_taken_once(config)


def test_a_loss_that_comes_with_other_errors_is_no_reason_to_go_on() -> None:
    lost = LostTrainerError("lost")
    assert module._lost_trainer(lost) is lost
    assert module._lost_trainer(ExceptionGroup("", [ExceptionGroup("", [lost])])) is lost
    with pytest.raises(ExceptionGroup):
        module._lost_trainer(ExceptionGroup("", [lost, ValueError()]))


def test_tensorboard_and_summary_are_those_of_the_last_attempt(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(folder, tmp_path / "run", STEPS, **ALONE)
    run = run_of(config)
    lost_at(run, 20)
    run.train()
    assert len(restarts_in(config)) == 1
    assert json.loads((config.out / "summary.json").read_text())["steps"] == STEPS
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("reward")] == [1, 2, 3, 4, 5]
