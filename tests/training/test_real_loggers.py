"""The real W&B, offline, and the real MLflow with a folder as its store: what they have after a run that goes
back, is resumed and ends.
"""

import asyncio
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.random_trees import random_tree
from tests.support.wandb_file import history, records
from treepo.config.run import RunConfig
from treepo.training.loggers import run_loggers
from treepo.training.run_folder import RunFolder
from treepo.training.run_state import RunState

pytestmark = pytest.mark.slow
SUMMARY = {"steps": 4, "accuracy_after": 0.5, "dtype": "float32"}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a library takes minutes to start."""
    monkeypatch.setattr(run_loggers, "_END_SECONDS", {"finished": 1200.0})


def config_of(out: Path, name: str, **options: Any) -> RunConfig:
    values = {"out": str(out), "steps": 9, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    return RunConfig.model_validate(values | {"logging": [name], name: {"table_every": 2} | options})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def as_numbers(tokens: np.ndarray) -> str:
    return " ".join(map(str, tokens))


def take(folder: RunFolder, steps: range, reward: float) -> None:
    for step in steps:
        folder.write_tree(random_tree(np.random.default_rng(step)), step, "7")
        folder.write_metrics(step, {"reward": reward, "leaves": 4, "none": math.nan, "grader/a%": 1.0})


def run_that_goes_back_and_is_resumed(config: RunConfig) -> None:
    """Steps 1 to 4 with a checkpoint of 2; back to it, step 3; resumed after 2, steps 3 and 4."""
    with RunFolder(config, decode=as_numbers) as folder:
        take(folder, range(1, 3), 0.1)
        state = RunState("d", steps_done=2, sizes=asyncio.run(folder.sizes()))
        take(folder, range(3, 5), 0.2)
        folder.go_back(state)
        take(folder, range(3, 4), 0.3)
    with RunFolder(config, state, decode=as_numbers) as folder:
        take(folder, range(3, 5), 0.4)
        asyncio.run(folder.write_summary(SUMMARY))


def test_the_newest_offline_run_of_wandb_is_the_whole_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path / "run", "wandb", mode="offline", project="math")
    run_that_goes_back_and_is_resumed(config)
    assert not warnings(caplog)
    link = json.loads((config.out / "wandb.json").read_bytes())
    folders = sorted((config.out / "wandb").glob("offline-run-*"))
    # offline-run-DATE_TIME-ID, and a number if two began in one second
    assert {folder.name.split("-")[3] for folder in folders} == {link["id"]}, "always the same run"
    steps = history((config.out / "wandb" / "latest-run").resolve())
    assert {step: each["reward"] for step, each in steps.items()} == {1: 0.1, 2: 0.1, 3: 0.4, 4: 0.4}
    assert math.isnan(steps[4]["none"])
    assert steps[4]["trees._type"] == "table-file"
    found = {record.WhichOneof("record_type"): record for record in records(folders[-1])}
    assert found["exit"].exit.exit_code == 0
    assert found["run"].run.project == "math"
    assert found["run"].run.display_name == "run"
    config_keys = {item.key for item in found["config"].config.update}
    assert {"seed", "sampling"} <= config_keys


def test_mlflow_has_every_step_and_both_values_of_a_repeated_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path / "run", "mlflow", tracking_uri=str(tmp_path / "store"), experiment="math")
    run_that_goes_back_and_is_resumed(config)
    assert not warnings(caplog)
    link = json.loads((config.out / "mlflow.json").read_bytes())
    (run,) = (tmp_path / "store").glob(f"*/{link['run_id']}")
    points = [line.split() for line in (run / "metrics" / "reward").read_text().splitlines()]
    assert [(int(step), float(value)) for _, value, step in points] == [
        (1, 0.1),
        (2, 0.1),
        (3, 0.2),
        (4, 0.2),
        (3, 0.3),
        (3, 0.4),
        (4, 0.4),
    ]
    assert {path.name for path in (run / "metrics" / "grader").iterdir()} == {"a_"}
    assert not (run / "metrics" / "none").exists()
    assert (run / "metrics" / "summary" / "accuracy_after").exists()
    assert (run / "params" / "sampling.width").read_text() == "16"
    artifacts = {path.name for path in (run / "artifacts").rglob("*.*")}
    assert artifacts == {
        "config.yaml",
        "summary.json",
        "step-00001.json",
        "step-00002.json",
        "step-00004.json",
    }
    assert "status: 3" in (run / "meta.yaml").read_text(), "FINISHED"
