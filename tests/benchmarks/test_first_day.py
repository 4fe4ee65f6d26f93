"""Stages of benchmarks/gpu/first_day.py fail, hang and die alone; the dry run runs them all."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu.first_day import STAGES, USUAL_MINUTES, chosen
from benchmarks.gpu.stage_process import Result, Settings, Stage, run_group
from tests.support.paths import ROOT


def stage(name: str, seconds: float = 0.0, deadline: float = 60.0) -> Stage:
    return Stage(name, f"tests.support.stages:{name}", seconds, deadline, "group")


def results(tmp_path: Path, *stages: Stage, left: float = 600.0) -> list[Result]:
    settings = Settings(
        dry_run=False,
        out=tmp_path,
        scratch=tmp_path,
        end=time.time() + left,
        stretch=1.0,
        attention_backend="triton",
    )
    return list(run_group(stages, settings))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the stages' processes import the benchmarks and tests from there


def test_stages_share_a_process_until_one_fails(tmp_path: Path) -> None:
    names = ("passes", "passes", "skips", "passes", "fails", "passes", "dies", "passes")
    stages = [stage(name) for name in names]
    found = results(tmp_path, *stages)
    assert tuple(one.stage for one in found) == names
    assert [one.status for one in found] == ["PASS", "PASS", "SKIP", "PASS", "FAIL", "PASS", "FAIL", "PASS"]
    processes = [one.figures["process"] for one in found if one.status == "PASS"]
    assert processes[0] == processes[1] == processes[2]
    assert len(set(processes)) == 3
    assert found[2].headline == "no such device"
    assert found[4].headline == "ValueError: wrong by 3"
    assert "ValueError: wrong by 3" in found[4].log
    assert found[6].headline == "its process ended with exit code 3"


def test_a_stage_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    hung, after = results(tmp_path, stage("hangs", deadline=0.2), stage("passes"))
    assert hung.status == "FAIL"
    assert "killed at its deadline" in hung.headline
    assert hung.log == ["about to hang"]
    assert after.status == "PASS"
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def test_a_stage_that_does_not_fit_is_skipped_and_a_shorter_one_runs(tmp_path: Path) -> None:
    long, short = results(tmp_path, stage("passes", seconds=1000), stage("passes"))
    assert (long.status, short.status) == ("SKIP", "PASS")
    assert long.headline.startswith("takes about 1000 s")


def test_what_stages_share_is_made_once_and_closed(tmp_path: Path) -> None:
    found = results(tmp_path, stage("shares"), stage("shares"))
    assert [one.figures["value"] for one in found] == [1, 1]
    assert (tmp_path / "closed").exists()


def test_names_and_groups_choose_stages() -> None:
    assert chosen(None) == list(STAGES)
    assert [one.name for one in chosen(["quickstart", "flex"])] == ["flex", "quickstart"]
    assert {one.group for one in chosen(["engine"])} == {"engine"}


def test_all_stages_fit_into_the_usual_time() -> None:
    """Otherwise the last would be skipped by everybody who does not ask for more."""
    assert sum(stage.seconds for stage in STAGES) <= 60 * USUAL_MINUTES


@pytest.mark.slow
def test_every_stage_runs_dry_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.first_day", "--out", str(tmp_path), "--dry-run"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    machine, *lines = map(json.loads, (tmp_path / "first_day.jsonl").read_text().splitlines())
    assert machine["card"] == "cpu"
    assert [line["stage"] for line in lines] == [one.name for one in STAGES]
    skipped = {line["stage"] for line in lines if line["status"] == "SKIP"}
    assert skipped <= {"engine_memory", "update_ipc", "update_registered", "offload"}  # these need a GPU
