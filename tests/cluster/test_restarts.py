"""When a training is started again, from where, and how often: on fake trainings, in virtual time."""

import asyncio
import json
import os
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from treepo.cluster import restarts
from treepo.cluster.restarts import FINAL, Saved, newest_saved, pause_seconds, wait_until_free, with_restarts
from treepo.data.folder_lock import locked
from treepo.errors import ConfigError, LostJobError
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.training.checkpoint_manifest import MANIFEST, CheckpointManifest
from treepo.training.run_state import RunState

LOST = None
"""An attempt that ends without an exit code."""


class Job:
    """A training that ends as `outcomes` say, one after the other: the exit code or LOST, and the steps of
    the newest checkpoint by then. It notes with which `resume` it was started, and when.
    """

    def __init__(self, *outcomes: tuple[int | None, int]) -> None:
        self.outcomes = list(outcomes)
        self.resumed: list[bool] = []
        self.times: list[float] = []
        self.said: list[str] = []
        self.saved: Saved | None = None

    async def attempt(self, resume: bool) -> int:
        self.resumed.append(resume)
        self.times.append(asyncio.get_running_loop().time())
        code, steps = self.outcomes.pop(0)
        if steps:
            self.saved = Saved(steps, (0, steps))
        if code is None:
            raise LostJobError("Ray lost the job")
        return code

    def run(self, most: int = 3, *, resume: bool = False) -> int:
        async def saved() -> Saved | None:
            return self.saved

        return run_virtually(with_restarts(self.attempt, saved, self.said.append, most=most, resume=resume))


@pytest.mark.parametrize("code", sorted(FINAL))
def test_a_training_that_ended_is_not_started_again(code: int) -> None:
    job = Job((code, 3))
    assert job.run() == code
    assert (job.resumed, job.said) == ([False], [])


def test_a_crash_is_followed_by_a_restart_from_the_newest_checkpoint() -> None:
    job = Job((137, 0), (LOST, 4), (0, 9))
    assert job.run() == 0
    assert job.resumed == [False, False, True]
    assert job.said == [
        "the training ended with exit code 137; restart 1 of 3 in 5 s, from the beginning",
        "Ray lost the job; restart 1 of 3 in 5 s, from the checkpoint of step 4",
    ]


def test_restarts_without_a_new_checkpoint_are_bounded_and_further_apart() -> None:
    job = Job((1, 0), *[(1, 2)] * 4)
    assert job.run() == 1
    assert [later - earlier for earlier, later in pairwise(job.times)] == [5, 5, 10, 20]
    ended = "the training ended with exit code 1; it is not started again after 3 restarts"
    assert job.said[-1] == f"{ended} without a new checkpoint"


def test_a_run_that_makes_progress_is_never_given_up() -> None:
    job = Job(*[(137, step) for step in range(1, 20)], (0, 20))
    assert job.run(most=1) == 0


def test_a_lost_training_without_restarts_is_the_launchs_error() -> None:
    with pytest.raises(LostJobError, match=r"^Ray lost the job$"):
        Job((LOST, 0)).run(most=0)
    with pytest.raises(LostJobError, match="after 1 restarts without a new checkpoint"):
        Job((LOST, 0), (LOST, 0)).run(most=1)
    job = Job((7, 0))
    assert job.run(most=0) == 7
    assert job.said == []


def test_an_earlier_runs_checkpoint_is_not_continued() -> None:
    """A new run in the folder of an earlier one dies before it has set the earlier run's files aside."""
    job = Job((137, 0), (137, 0), (137, 1), (0, 2))
    job.saved = Saved(1, (5, 5))
    assert job.run() == 0
    assert job.resumed == [False, False, False, True]
    assert "from the beginning" in job.said[0]


def test_a_run_that_began_with_resume_keeps_it() -> None:
    job = Job((137, 0), (0, 0))
    job.saved = Saved(8, (5, 5))
    assert job.run(resume=True) == 0
    assert job.resumed == [True, True]
    assert "from the checkpoint of step 8" in job.said[0]


def test_the_back_off_is_bounded() -> None:
    pauses = [pause_seconds(restart) for restart in range(1, 2000)]
    assert pauses[:3] == [5, 10, 20]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 300


def checkpoint(out: Path, steps: int) -> None:
    state = RunState("the data's fingerprint")
    state.steps_done = steps
    folder = out / "checkpoints" / f"step-{steps:05d}"
    folder.mkdir(parents=True)
    manifest = CheckpointManifest("float32", False, steps, {}, asdict(state))
    manifest.write(folder)


def test_the_newest_checkpoint_of_another_run_is_another_one(tmp_path: Path) -> None:
    assert newest_saved(tmp_path) is None
    checkpoint(tmp_path, 3)
    first = newest_saved(tmp_path)
    assert first is not None
    assert first.steps == 3
    assert newest_saved(tmp_path) == first
    (tmp_path / "checkpoints").rename(tmp_path / "earlier")
    checkpoint(tmp_path, 3)
    assert newest_saved(tmp_path) != first


def test_a_damaged_checkpoint_does_not_end_the_launch(tmp_path: Path) -> None:
    """It is for the training to say so, with --resume alone."""
    checkpoint(tmp_path, 3)
    (tmp_path / "checkpoints" / "step-00003" / MANIFEST).write_text("{")
    found = newest_saved(tmp_path)
    assert found is not None
    assert found.steps == 3


def test_a_restart_waits_for_the_folders_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        with locked(tmp_path):
            waiting = asyncio.create_task(wait_until_free(tmp_path))
            await asyncio.sleep(0.01)
            assert not waiting.done()
        await waiting

    asyncio.run(scenario())
    monkeypatch.setattr(restarts, "_FREE_SECONDS", 0.0)
    with locked(tmp_path), pytest.raises(ConfigError, match="is in use by process"):
        asyncio.run(wait_until_free(tmp_path))
    assert not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text(json.dumps({"process": os.getpid(), "host": "x"}))  # of a dead driver
    asyncio.run(wait_until_free(tmp_path))
