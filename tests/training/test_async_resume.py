"""Runs that are killed at random moments and resumed lose no prompt and train none twice."""

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoint_damage import as_earlier_version
from tests.support.fake_trainer import NamedEngine
from tests.support.training_runs import (
    ALONE,
    ASYNC,
    OVERSAMPLE,
    VERY_ASYNC,
    Run,
    check_every_prompt_was_taken_once,
    config_of,
    lines,
    saved_schedule,
    steps_of,
    trees_of,
    versions_of,
)
from treepo.config.run import RunConfig
from treepo.errors import ModelError
from treepo.training.checkpoints import newest
from treepo.training.ready_trees import read_ready_trees, ready_trees_lines

pytestmark = pytest.mark.usefixtures("graded")


class KilledError(Exception):
    """Stands for the end of the process."""


def run_of(config: RunConfig, *, resume: bool = False, turns: int = 40, shuffle: int = 0) -> Run:
    run = Run(config, resume, engine=NamedEngine(end=0.1, pace=3, shuffle=shuffle))
    run.trainer.turns = turns
    return run


def killed_at_call(number: int) -> Callable[[str], None]:
    """Kills the run at a call that trains or writes, counted from 1."""
    calls = 0

    def before(name: str) -> None:
        nonlocal calls
        calls += name in ("train_batch", "save", "finish_save", "export")
        if calls == number:
            raise KilledError(name)

    return before


def killed_often(config: RunConfig, rng: random.Random) -> None:
    """Train to the end, killed on the way at a few random moments."""
    resume = False
    for _ in range(4):
        run = run_of(config, resume=resume, turns=rng.choice([0, 40, 200]), shuffle=rng.randrange(1000))
        if rng.random() < 0.5:
            run.trainer.before = killed_at_call(rng.randrange(2, 12))
        else:
            run.killed_after = rng.randrange(100, 1500)
        try:
            run.train()
        except (KilledError, asyncio.CancelledError):
            resume = newest(config.out) is not None
        else:
            return
    run_of(config, resume=resume, shuffle=rng.randrange(1000)).train()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", [{}, OVERSAMPLE, ASYNC, VERY_ASYNC])
def test_a_killed_run_trains_every_prompt_once(
    folder: Path, tmp_path: Path, mode: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    learning = {"mini_batches": 2, "dynamic_sampling": bool(seed % 2)}
    checkpoint = {"every": rng.randint(1, 3)}
    config = config_of(
        folder, tmp_path / "run", steps=8, learning=learning, checkpoint=checkpoint, **ALONE, **mode
    )
    killed_often(config, rng)
    assert [line["step"] for line in steps_of(config.out)] == list(range(1, 9))
    check_every_prompt_was_taken_once(config)
    for step, tree in trees_of(config.out):
        versions = versions_of(tree)
        assert step - 1 - config.loop.max_staleness <= versions[0] <= versions[-1] <= step - 1
    for line in steps_of(config.out):
        taken = sum(step == line["step"] for step, _ in trees_of(config.out))
        assert taken - sum(line.get(f"dropped/{reason}", 0) for reason in ("equal", "ungraded")) == 4


def saved_with_ready_trees(folder: Path, out: Path, **changes: Any) -> RunConfig:
    """A run whose last checkpoint has finished trees: its trainer is slow."""
    settings = {"sampling": {"width": 2}} | ALONE | VERY_ASYNC | changes
    config = config_of(folder, out, steps=9, checkpoint={"every": 1}, **settings)
    run = run_of(config, turns=800)
    run.trainer.before = killed_at_call(9)  # train, save, finish, ...
    with pytest.raises(KilledError):
        run.train()
    assert saved_schedule(out).ready
    return config


@pytest.mark.parametrize("routes", [False, True])
def test_finished_trees_come_back_as_they_were(folder: Path, tmp_path: Path, routes: bool) -> None:
    replay = "rollout" if routes else "none"
    config = saved_with_ready_trees(
        folder, tmp_path / "run", save_routes=routes, trainer={"routing_replay": replay}
    )
    found = newest(config.out)
    assert found is not None
    content = (found[0] / "ready_trees.jsonl").read_bytes()
    trees = read_ready_trees(found[0] / "ready_trees.jsonl")
    assert ready_trees_lines(trees) == content
    assert (b'"prompt_routes":{"dtype":"uint8"' in content) == routes
    assert list(trees) == found[1].schedule.ready
    for position, began in zip(found[1].schedule.ready, found[1].schedule.began, strict=True):
        assert versions_of(trees[position].tree)[0] >= began

    done = found[1].steps_done
    run_of(config, resume=True).train()
    record = {json.dumps(line["segments"]) for line in map(json.loads, content.splitlines())}
    trained = {json.dumps(line["segments"]): line["step"] for line in lines(config.out / "trees.jsonl")}
    assert record <= trained.keys()
    assert {trained[one] for one in record} <= set(range(done + 1, done + 4))
    check_every_prompt_was_taken_once(config)


def test_dropped_trees_that_no_step_has_counted_come_back(folder: Path, tmp_path: Path) -> None:
    learning = {"dynamic_sampling": True, "max_refills": 3}
    config = saved_with_ready_trees(folder, tmp_path / "run", learning=learning)
    dropped = saved_schedule(config.out).dropped
    assert dropped
    found = newest(config.out)
    assert found is not None
    run_of(config, resume=True).train()
    next_step = next(line for line in steps_of(config.out) if line["step"] == found[1].steps_done + 1)
    assert next_step["dropped/equal"] >= len(dropped)
    check_every_prompt_was_taken_once(config)


@pytest.mark.parametrize("to", ["sync", "staleness 1"])
def test_trees_that_are_too_stale_for_a_lower_bound_are_sampled_again(
    folder: Path, tmp_path: Path, to: str
) -> None:
    config = saved_with_ready_trees(folder, tmp_path / "run")
    found = newest(config.out)
    assert found is not None
    loop = {"mode": "sync", "max_staleness": 0} if to == "sync" else {"mode": "async", "max_staleness": 1}
    values = config.model_dump() | {"loop": loop, "steps": 12}
    lower = RunConfig.model_validate(values)
    stale = sum(found[1].steps_done - began > loop["max_staleness"] for began in found[1].schedule.began)
    assert stale
    summary = run_of(lower, resume=True).train()
    assert summary["resampled_trees"] >= stale
    for step, tree in trees_of(config.out):
        if step > found[1].steps_done:
            assert versions_of(tree)[0] >= step - 1 - loop["max_staleness"]
    check_every_prompt_was_taken_once(lower)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20] + b"\n" + b" " * 19, r"ready_trees\.jsonl:\d+: not a tree of a checkpoint"),
        (lambda text: text.replace(b'"position":', b'"position_":'), r":1: not a tree .*position"),
        (lambda text: text.replace(b"[", b"(", 1), r":1: not a tree of a checkpoint"),
        (lambda text: text.replace(b'"position":', b'"position":9', 1), r"it has the trees .* and check"),
    ],
)
def test_a_damaged_file_of_finished_trees_is_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    """With neither sizes nor checksums in the manifest, else those are compared first."""
    config = saved_with_ready_trees(folder, tmp_path / "run")
    found = newest(config.out)
    assert found is not None
    path = found[0] / "ready_trees.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    as_earlier_version(found[0], files={})
    with pytest.raises(ModelError, match=message) as error:
        run_of(config, resume=True).train()
    assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(ModelError, match=r"ready_trees\.jsonl: not readable: No such file"):
        run_of(config, resume=True).train()


@pytest.mark.parametrize("mode", [{}, ASYNC])
def test_an_evaluation_that_was_lost_is_repeated(folder: Path, tmp_path: Path, mode: dict[str, Any]) -> None:
    """The run dies after the checkpoint of step 2 is whole, in the training of step 3 or before its save."""
    for call in (5, 7):  # train 1, train 2, save, finish, train 3, train 4, save
        config = config_of(folder, tmp_path / str(call), steps=6, evaluation={"every": 2}, **mode)
        run = run_of(config)
        run.trainer.before = killed_at_call(call)
        with pytest.raises(KilledError):
            run.train()
        resumed = run_of(config, resume=True)
        summary = resumed.train()
        found = [line for line in lines(config.out / "metrics.jsonl") if "heldout/accuracy" in line]
        assert [line["step"] for line in found] == [0, 2, 4, 6]
        assert {line["heldout/accuracy"] for line in found} == {summary["accuracy_before"]}
        assert list(resumed.seen.accuracies) == [2, 4, 6]


def test_oversampling_may_change(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run", steps=4, **ALONE)
    run_of(config).train()
    values = config.model_dump()
    values["sampling"]["oversample"], values["steps"] = 1.5, 6
    more = RunConfig.model_validate(values)
    run_of(more, resume=True).train()
    check_every_prompt_was_taken_once(more)
