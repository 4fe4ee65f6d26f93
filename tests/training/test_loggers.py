"""What loggers are told: which trees, which steps again, which words never; what they do when it fails."""

import asyncio
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.random_trees import random_tree
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.preflight import loggers as preflight
from treepo.preflight.loggers import check_loggers
from treepo.training.loggers import process, run_loggers
from treepo.training.loggers.feed import Message
from treepo.training.loggers.logger import State
from treepo.training.loggers.process import Dispatcher
from treepo.training.loggers.run_loggers import RunLoggers
from treepo.training.loggers.secret_text import values_without_secrets, without_secrets
from treepo.training.run_folder import RunFolder


def config_of(out: Path, **changes: Any) -> RunConfig:
    values = {"out": str(out), "steps": 9, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    return RunConfig.model_validate(values | changes)


class Server:
    """A `Logger` whose server has steps up to `last`, and fails as often as `errors` has an error."""

    def __init__(self, last: int = 0, errors: Sequence[Exception] = ()) -> None:
        self.calls: list[Any] = []
        self._last, self._errors = last, list(errors)

    def begin(self, step: int) -> int:
        self._call("begin", step)
        return min(self._last, step)

    def config(self) -> None:
        self._call("config")

    def metrics(self, step: int, seconds: float, values: Mapping[str, float | None]) -> None:
        self._call("metrics", step, seconds, dict(values))

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._call("table", step, columns, rows)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._call("summary", values)

    def end(self, state: State) -> None:
        self._call("end", state)

    def passes(self, error: Exception) -> bool:
        return isinstance(error, OSError)

    def _call(self, *call: object) -> None:
        if self._errors:
            raise self._errors.pop(0)
        self.calls.append(call)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of a logger's process, which take no time."""
    pauses: list[float] = []
    monkeypatch.setattr(process, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


def dispatched(folder: Path, server: Server, *messages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers to the messages."""
    answers = io.BytesIO()
    lines = [json.dumps(message).encode() for message in messages]
    Dispatcher(folder / "metrics.jsonl", answers).follow(server, lines)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_server_gets_the_steps_that_it_lacks(tmp_path: Path) -> None:
    lines = [f'{{"step": {step}, "time": {step}.5, "reward": null}}\n' for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    server = Server(last=1)
    begin = {"kind": "begin", "step": 3, "size": sum(map(len, lines[:3]))}
    dispatched(tmp_path, server, begin, {"kind": "end", "state": "finished"})
    assert server.calls == [
        ("begin", 3),
        ("metrics", 2, 2.5, {"reward": None}),
        ("metrics", 3, 3.5, {"reward": None}),
        ("end", "finished"),
    ]


def test_a_server_that_is_down_is_tried_until_it_answers(tmp_path: Path, pauses: list[float]) -> None:
    server = Server(errors=[ConnectionError("no route")] * 8)
    answers = dispatched(tmp_path, server, {"kind": "summary", "values": {}})
    assert answers == [
        {"trouble": "no route; it is tried again, and the run goes on"},
        {"info": "it answers again"},
        {"done": True},
    ]
    assert server.calls == [("summary", {})]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.usefixtures("pauses")
def test_what_a_server_refuses_is_left_out(tmp_path: Path) -> None:
    server = Server(errors=[ValueError("not\na name."), ValueError("not a name 2")])
    config: dict[str, Any] = {"kind": "config"}
    answers = dispatched(tmp_path, server, config, config, {"kind": "end", "state": "failed"})
    refused = {"warning": "not a name; the config is left out, and the run goes on"}
    assert answers == [refused, *[{"done": True}] * 3], "which is told once"
    assert server.calls == [("end", "failed")]


def test_a_beginning_is_never_left_out(tmp_path: Path, pauses: list[float]) -> None:
    server = Server(errors=[ValueError("no such project")])
    answers = dispatched(tmp_path, server, {"kind": "begin", "step": 0, "size": 0})
    assert "it is tried again" in answers[0]["trouble"]
    assert server.calls == [("begin", 0)]
    assert len(pauses) == 1


def test_secrets_are_in_no_text() -> None:
    environment = {"WANDB_API_KEY": "0123456789", "MLFLOW_TRACKING_PASSWORD": "letmein99", "HOME": "/home/me"}
    text = "http://me:pw@host/x refused 0123456789 and letmein99 in /home/me"
    assert without_secrets(text, environment) == "http://...@host/x refused ... and ... in /home/me"
    values = {"a": ["http://me:pw@host"], "b": {"c": 1, "d": None}}
    assert values_without_secrets(values) == {"a": ["http://...@host"], "b": {"c": 1, "d": None}}


class Kept:
    """A `Feed` that keeps what it is given."""

    def __init__(self, name: str, opening: Mapping[str, Any]) -> None:
        self.name, self.opening = name, opening
        self.messages: list[Message] = []
        self.state: State | None = None

    def add(self, message: Message) -> None:
        self.messages.append(message)

    def finish(self, state: State) -> None:
        self.state = state

    def wait(self, seconds: float) -> None:
        assert 0 <= seconds <= 30

    def told(self) -> list[Any]:
        """The kind and step of each message."""
        contents = [message.make() for message in self.messages]
        return [(each["kind"], each.get("step", each.get("record", {}).get("step"))) for each in contents]


@pytest.fixture
def feeds(monkeypatch: pytest.MonkeyPatch) -> list[Kept]:
    """The feeds of a run."""
    made: list[Kept] = []

    def make(name: str, opening: Mapping[str, Any]) -> Kept:
        made.append(Kept(name, opening))
        return made[-1]

    monkeypatch.setattr(run_loggers, "Feed", make)
    return made


def log(loggers: RunLoggers, steps: range) -> None:
    for step in steps:
        for number in range(3):
            rng = np.random.default_rng(number)
            loggers.tree(random_tree(rng, f"p{number}", max_depth=2), step, "7")
        loggers.metrics({"step": step, "time": 1.0, "reward": 0.5}, 100 * step)


def as_numbers(tokens: np.ndarray) -> str:
    return " ".join(map(str, tokens))


def test_tables_hold_the_leaves_of_the_first_trees(tmp_path: Path, feeds: list[Kept]) -> None:
    config = config_of(
        tmp_path, logging=["wandb", "mlflow"], wandb={"table_every": 2}, mlflow={"table_every": None}
    )
    with RunLoggers(config, "metrics.jsonl", as_numbers) as loggers:
        loggers.begin(0, 0)
        log(loggers, range(1, 5))
    wandb, mlflow = feeds
    numbers = [("metrics", step) for step in range(1, 5)]
    assert mlflow.told() == [("begin", 0), ("config", None), *numbers]
    tables = [message.make() for message in wandb.messages]
    tables = [each for each in tables if each["kind"] == "table"]
    assert [each["step"] for each in tables] == [1, 2, 4]
    trees = [random_tree(np.random.default_rng(number), max_depth=2) for number in range(2)]
    assert len(tables[0]["rows"]) == sum(len(tree.leaves) for tree in trees)
    row = dict(zip(tables[0]["columns"], tables[0]["rows"][0], strict=True))
    leaf = trees[0].leaves[0]
    response = trees[0].response(leaf)
    assert row["response"] == as_numbers(response)
    assert (row["prompt_id"], row["answer"], row["tokens"]) == ("p0", "7", len(response))
    assert (row["verdict"], row["reward"], row["stop"]) == ("correct", leaf.reward, "eos")


def test_trees_of_a_step_that_is_taken_back_are_in_no_table(tmp_path: Path, feeds: list[Kept]) -> None:
    with RunLoggers(config_of(tmp_path, logging=["wandb"]), "metrics.jsonl", as_numbers) as loggers:
        loggers.tree(random_tree(np.random.default_rng(0)), 1, "7")
        loggers.begin(0, 0)
        loggers.metrics({"step": 1, "time": 1.0}, 100)
    assert feeds[0].told() == [("begin", 0), ("config", None), ("metrics", 1)]
    assert feeds[0].messages[-1].after == {"kind": "begin", "step": 1, "size": 100}


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "finished"), (ValueError(), "failed"), (asyncio.CancelledError(), "stopped")],
)
def test_a_logger_learns_how_the_run_ended(
    tmp_path: Path, feeds: list[Kept], error: BaseException | None, state: State
) -> None:
    loggers = RunLoggers(config_of(tmp_path, logging=["mlflow"]), "metrics.jsonl", None)
    loggers.__enter__()
    loggers.__exit__(type(error) if error else None, error, None)
    assert feeds[0].state == state
    assert feeds[0].opening["config"]["steps"] == 9


def test_a_run_without_tensorboard_has_no_such_folder_and_goes_on(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", logging=[])
    with RunFolder(config) as folder:
        folder.write_metrics(1, {"reward": 1.0})
        asyncio.run(folder.sizes())
    assert {entry.name for entry in config.out.iterdir()} >= {"metrics.jsonl", "trees.jsonl"}
    assert not (config.out / "tensorboard").exists()


def test_a_package_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "absent_logger").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not preflight._is_installed("absent_logger"), "a folder of runs is no package"
    assert preflight._is_installed("json")
    monkeypatch.setattr(preflight, "_is_installed", lambda _: False)
    check_loggers(config_of(tmp_path))
    with pytest.raises(
        ConfigError, match=r"^logging: mlflow is not installed; pip install 'treepo\[mlflow\]'"
    ):
        check_loggers(config_of(tmp_path, logging=["mlflow"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wandb": {"project": "x"}}, r"wandb is configured, but logging = \[tensorboard, jsonl\]"),
        ({"logging": ["wand"]}, "'tensorboard', 'wandb', 'mlflow' or 'jsonl'"),
        ({"logging": ["mlflow"], "mlflow": {"tracking_uri": "http://me:pw@host"}}, "should match pattern"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **changes)
