"""Which W&B run a run goes on with, if the server is there, goes back, refuses or is away: a fake library."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from treepo.training.loggers.logger import NO_STEP, LoggedRun

OPTIONS = {"project": None, "entity": None, "name": None, "group": None, "tags": [], "mode": None}


class WandbError(Exception):
    """As wandb.errors.Error."""


class Cloud(ModuleType):
    """The library, with a server that has the history of each run by its id.

    down: it cannot be reached. rewinds: it can go back. inits: the arguments of each `init`.
    """

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[int, Any]] = {}
        self.down, self.rewinds = False, True
        self.inits: list[dict[str, Any]] = []
        self.Settings = SimpleNamespace

    def init(self, *, id: str, mode: str, **how: Any) -> "CloudRun":  # noqa: A002 (W&B's name)
        self.inits.append({"id": id, "mode": mode} | how)
        if mode == "offline":
            return CloudRun({}, mode)
        if self.down:
            raise WandbError("no\nroute.")
        if "resume_from" in how:
            if not self.rewinds:
                raise WandbError("not on this server")
            name, _, step = how["resume_from"].partition("?_step=")
            assert name == id
            self.runs[id] = {at: row for at, row in self.runs[id].items() if at <= int(step)}
        return CloudRun(self.runs.setdefault(id, {}), mode)

    def teardown(self) -> None:
        pass


class CloudRun:
    """A run of the library."""

    def __init__(self, rows: dict[int, Any], mode: str) -> None:
        self.rows = rows
        self.starting_step = max(rows) + 1 if rows else 0
        self.project, self.entity, self.url = "treepo", None, None if mode == "offline" else "https://w/x"
        self.settings = SimpleNamespace(sync_dir="wandb/offline-run-1")

    def log(self, values: dict[str, Any], step: int) -> None:
        assert step >= max(self.rows, default=0), "W&B ignores such a step"
        self.rows.setdefault(step, {}).update(values)

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    cloud, errors = Cloud(), ModuleType("wandb.errors")
    errors.Error = WandbError  # type: ignore[attr-defined]  # a fake module
    monkeypatch.setitem(sys.modules, "wandb", cloud)
    monkeypatch.setitem(sys.modules, "wandb.errors", errors)
    for variable in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_NAME", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    yield cloud
    sys.modules.pop("treepo.training.loggers.wandb_logger", None)  # it has the fake


def logger_of(folder: Path, said: list[str], **options: Any) -> Any:
    from treepo.training.loggers.wandb_logger import WandbLogger

    def tell(text: str, *, warn: bool = True) -> None:
        if warn:
            said.append(text)

    return WandbLogger(LoggedRun(folder, OPTIONS | options, {}, 1), tell)


def take(logger: Any, *steps: int, reward: float = 0.0) -> None:
    for step in steps:
        logger.metrics(step, 1.0, {"reward": reward})


def test_a_resumed_run_goes_on_with_the_same_wandb_run(tmp_path: Path, cloud: Cloud) -> None:
    said: list[str] = []
    first = logger_of(tmp_path, said)
    assert first.begin(0) == NO_STEP
    take(first, 0, 1, 2, 3)
    second = logger_of(tmp_path, said)
    assert second.begin(3) == 3
    take(second, 4)
    second.end("finished")
    ((name, rows),) = cloud.runs.items()
    assert sorted(rows) == [0, 1, 2, 3, 4]
    link = {"id": name, "project": "treepo", "entity": None, "url": "https://w/x"}
    assert json.loads((tmp_path / "wandb.json").read_bytes()) == link
    assert not said
    assert cloud.inits[0]["name"] == tmp_path.name
    assert cloud.inits[0]["project"] == "treepo"


def test_a_run_that_goes_back_rewinds(tmp_path: Path, cloud: Cloud) -> None:
    said: list[str] = []
    logger = logger_of(tmp_path, said)
    logger.begin(0)
    take(logger, 1, 2, 3, 4, reward=0.1)
    assert logger.begin(2) == 2
    take(logger, 3, reward=0.2)
    (rows,) = cloud.runs.values()
    assert {step: row["reward"] for step, row in rows.items()} == {1: 0.1, 2: 0.1, 3: 0.2}
    assert not said


def test_a_server_that_cannot_rewind_keeps_the_first_values(tmp_path: Path, cloud: Cloud) -> None:
    said: list[str] = []
    cloud.rewinds = False
    logger = logger_of(tmp_path, said)
    logger.begin(0)
    take(logger, 1, 2, 3, 4, reward=0.1)
    assert logger.begin(2) == 2
    take(logger, 3, 4, 5, reward=0.2)
    (rows,) = cloud.runs.values()
    assert [row["reward"] for row in rows.values()] == [0.1, 0.1, 0.1, 0.1, 0.2]
    assert said == [
        "not on this server; the W&B run cannot go back to step 2: steps 3 to 4 keep their first values there"
    ]


def test_without_the_server_a_run_is_logged_offline_and_later_completed(tmp_path: Path, cloud: Cloud) -> None:
    said: list[str] = []
    cloud.down = True
    logger = logger_of(tmp_path, said)
    assert logger.begin(3) == NO_STEP, "an offline run has no step yet, so all are logged"
    assert said == [
        "no route; the run is logged offline, and `wandb sync wandb/offline-run-1` uploads it",
    ]
    cloud.down = False
    later = logger_of(tmp_path, said)
    assert later.begin(5) == NO_STEP
    assert list(cloud.runs) == [cloud.inits[0]["id"]]


def test_the_environment_counts_where_the_configuration_is_silent(
    tmp_path: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (("MODE", "offline"), ("NAME", "n"), ("PROJECT", "p"), ("RUN_ID", "i")):
        monkeypatch.setenv(f"WANDB_{variable}", value)
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    logger_of(tmp_path, []).begin(0)
    logger_of(tmp_path, [], name="own", project="mine", mode="online").begin(0)
    by_variables, by_keys = cloud.inits
    assert {"id": "i", "mode": "offline", "name": "n", "project": "p"}.items() <= by_variables.items()
    assert {"id": "i", "mode": "online", "name": "own", "project": "mine"}.items() <= by_keys.items()
    assert "dir" not in by_variables
