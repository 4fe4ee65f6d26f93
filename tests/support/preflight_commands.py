"""The checks of every command that reads a model folder, each as the command makes them; nothing is started.

They expect the folder `model` and the file problems.jsonl in the working directory.
"""

import shutil
from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner

from treepo.cli.main import app
from treepo.config.evaluate import EvalConfig
from treepo.config.rollout import RolloutConfig
from treepo.config.run import RunConfig
from treepo.planning.plan import make_plan
from treepo.preflight.inputs import read_evaluation_inputs, read_rollout_inputs, read_train_inputs

RESPONSE = 32
Settings = dict[str, Any]


def train(settings: Settings, data: Settings) -> None:
    data = data | {"train": "problems.jsonl", "prompts_per_step": 2}
    read_train_inputs(RunConfig.model_validate(settings | {"steps": 1, "data": data}))


def rollout(settings: Settings, data: Settings) -> None:
    read_rollout_inputs(
        RolloutConfig.model_validate(settings | {"data": data | {"prompts": "problems.jsonl"}})
    )


def evaluate(settings: Settings, data: Settings) -> None:
    data = data | {"benchmarks": [{"path": "problems.jsonl"}]}
    read_evaluation_inputs(EvalConfig.model_validate(settings | {"data": data}))


def plan(settings: Settings, data: Settings) -> None:
    data = data | {"train": "problems.jsonl", "prompts_per_step": 2}
    make_plan(RunConfig.model_validate(settings | {"steps": 1, "data": data}), lambda _: None)


def convert(_settings: Settings, _data: Settings) -> None:
    result = CliRunner().invoke(app, ["convert", "model", "converted"], input="y\n")
    shutil.rmtree("converted", ignore_errors=True)
    if result.exception is not None:
        raise result.exception


COMMANDS = (train, rollout, evaluate, convert, plan)
ENGINES = (train, rollout, evaluate)


def run(command: Callable[[Settings, Settings], None], max_prompt_tokens: int = 256, **engine: Any) -> None:
    """Make a command's checks. engine: keys of its configuration."""
    sampling = {"segment_tokens": 8, "max_depth": 4, "max_response_tokens": RESPONSE}
    settings = {"out": "out", "model": {"path": "model"}, "sampling": sampling, "engine": engine}
    command(settings, {"max_prompt_tokens": max_prompt_tokens})
