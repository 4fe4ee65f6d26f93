"""One preflight for every command that starts engines: a model that SGLang cannot serve is refused by all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import POSITIONS, write_model_and_problems
from treepo.config.evaluate import EvalConfig
from treepo.config.rollout import RolloutConfig
from treepo.config.run import RunConfig
from treepo.errors import DataError, TreepoError
from treepo.preflight.inputs import read_evaluation_inputs, read_rollout_inputs, read_train_inputs

RESPONSE, KEPT_FREE = 32, 6
FITS = POSITIONS - KEPT_FREE - RESPONSE
Settings = dict[str, Any]


def train(settings: Settings, data: Settings) -> None:
    data = data | {"train": "problems.jsonl", "prompts_per_step": 2}
    read_train_inputs(RunConfig.model_validate(settings | {"steps": 1, "data": data}))


def rollout(settings: Settings, data: Settings) -> None:
    data = data | {"prompts": "problems.jsonl"}
    read_rollout_inputs(RolloutConfig.model_validate(settings | {"data": data}))


def evaluate(settings: Settings, data: Settings) -> None:
    data = data | {"benchmarks": [{"path": "problems.jsonl"}]}
    read_evaluation_inputs(EvalConfig.model_validate(settings | {"data": data}))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model_and_problems(tmp_path, tmp_path / "problems.jsonl", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_model(folder: Path, **changes: object) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(command: Callable[[Settings, Settings], None], max_prompt_tokens: int = 256, **engine: Any) -> None:
    sampling = {"segment_tokens": 8, "max_depth": 4, "max_response_tokens": RESPONSE}
    settings = {"out": "out", "model": {"path": "model"}, "sampling": sampling, "engine": engine}
    command(settings, {"max_prompt_tokens": max_prompt_tokens})


@pytest.mark.parametrize("command", [train, rollout, evaluate])
def test_every_command_makes_the_same_checks(
    command: Callable[[Settings, Settings], None], folder: Path
) -> None:
    read(command)
    read(command, FITS)
    with pytest.raises(
        TreepoError, match=rf"of which SGLang keeps {KEPT_FREE} free: {POSITIONS - KEPT_FREE} are"
    ):
        read(command, FITS + 1)
    with pytest.raises(TreepoError, match=r"engine\.max_total_tokens = 290, of which SGLang keeps"):
        read(command, max_total_tokens=290)
    with pytest.raises(TreepoError, match=r"engine\.tensor = 3: model has \d+ attention heads"):
        read(command, tensor=3)
    change_model(folder, model_type="qwen3_moe", mlp_only_layers=[0])
    with pytest.raises(TreepoError, match=r"mlp_only_layers = \[0\] in config\.json; SGLang serves"):
        read(command)


@pytest.mark.parametrize("command", [train, rollout, evaluate])
def test_every_command_reads_rows_by_the_same_rules(
    command: Callable[[Settings, Settings], None], folder: Path
) -> None:
    problems = folder / "problems.jsonl"
    lines = problems.read_text().splitlines()
    row = json.loads(lines[1]) | {"data_source": "half \ud83d"}
    problems.write_text(f"{lines[0]}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=r"problems.jsonl:2: column 'data_source' has half a surrogate pair"):
        read(command)


@pytest.mark.parametrize("command", [train, evaluate])
def test_an_extra_column_that_the_endpoint_cannot_be_sent_is_refused(
    command: Callable[[Settings, Settings], None], folder: Path
) -> None:
    problems = folder / "problems.jsonl"
    rows = [json.loads(line) | {"more": float("nan")} for line in problems.read_text().splitlines()]
    problems.write_text("\n".join(map(json.dumps, rows)))
    columns = {"extra": "more"}

    def with_extra(settings: Settings, data: Settings) -> None:
        reward = {"url": "http://127.0.0.1:1/"}
        if command is train:
            train(settings | {"reward": reward}, data | {"columns": columns})
        else:
            benchmarks = [{"path": "problems.jsonl", "columns": columns}]
            config = settings | {"reward": reward, "data": data | {"benchmarks": benchmarks}}
            read_evaluation_inputs(EvalConfig.model_validate(config))

    with pytest.raises(DataError, match=r"problems.jsonl:1: column 'more' does not fit into JSON"):
        read(with_extra)
