"""`treepo init`: a first configuration for a model folder and a data file, with a layout that fits."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from treepo.config.data import ColumnsConfig, PromptsConfig
from treepo.config.run import RunConfig
from treepo.config.yaml_text import read_value
from treepo.data.model_config import read_model_config, text_config
from treepo.data.prompts import DataReport, check_prompts, load_prompts
from treepo.data.tokenizer import load_tokenizer
from treepo.errors import ConfigError, DataError, one_line
from treepo.planning.found_machine import Machine

# Column maps to try in turn: names of treepo/data/columns, or maps.
_COLUMNS: tuple[Any, ...] = (
    {},
    "gsm8k",
    "aime24",
    "olympiadbench",
    "minerva_math",
    {"prompt": "question", "answer": "answer", "source": None},
    {"prompt": "prompt", "answer": "answer", "source": None},
)
_MEASURED = 5000  # prompts whose length is looked at
_LONGEST_PROMPT = 1 << 20
_ROUND = 64  # tokens, to which a prompt's limit is rounded up
_KEPT_FREE = 8  # positions that an engine does not use
_DEPTH = 8
_LEAST_RESPONSE = 64


@dataclass(frozen=True, slots=True)
class Problems:
    """A data file. columns: as the configuration writes them. longest: tokens of the longest prompt that was
    looked at. all_usable: whether no row has to be skipped.
    """

    path: Path
    columns: Any
    rows: int
    longest: int
    all_usable: bool


def read_problems(path: Path, model: Path) -> Problems:
    """Find the file's columns, and how long its prompts are. Raises DataError or ModelError."""
    columns, report = _find_columns(path)
    rules = PromptsConfig(max_prompt_tokens=_LONGEST_PROMPT, bad_rows="skip")
    prompts = load_prompts(path, ColumnsConfig.model_validate(columns), load_tokenizer(model), rules)
    measured = prompts[:_MEASURED]
    longest = max(len(prompt.tokens) for prompt in measured)
    usable = prompts.report.usable
    return Problems(path, columns, usable, longest, usable == report.rows == len(measured))


def _find_columns(path: Path) -> tuple[Any, DataReport]:
    """The first map by which most rows are usable, and what it found."""
    refused: list[DataError] = []
    for columns in _COLUMNS:
        try:
            report = check_prompts(
                path, ColumnsConfig.model_validate(columns), PromptsConfig(bad_rows="skip")
            )
        except DataError as error:
            refused.append(error)
            continue
        if report.usable * 2 > report.rows:
            return columns, report
    names = ", ".join(str(columns or "prompt and reward_model.ground_truth") for columns in _COLUMNS)
    reason = f"; by the first: {one_line(refused[0])}" if refused else ""
    raise DataError(
        f"{path}: no column map gives most rows a prompt and an answer (tried: {names}){reason}; write the "
        "file by hand, where data.columns names the columns (docs/configuration.md)"
    )


def first_config(
    model: Path,
    problems: Problems,
    run: Path,
    machine: Machine,
    misfit: Callable[[RunConfig], str | None],
) -> RunConfig:
    """The first layout in the order of preference that fits.

    misfit: why a configuration does not fit; None if it does. Raises ConfigError if none does.
    """
    reason = "no layout divides the model"
    for layout in _layouts(machine):
        try:
            config = RunConfig.model_validate(_values(model, problems, run, machine, layout))
        except ValidationError as error:
            raise ConfigError(f"{problems.path}: {one_line(error.errors()[0]['msg'])}") from None
        try:
            problem = misfit(config)
        except ConfigError as error:  # the ranks cannot divide the model
            problem = str(error)
        if problem is None:
            return config
        reason = problem
    raise ConfigError(f"{model} does not fit {machine.name}: {reason}")


def _layouts(machine: Machine) -> Iterator[Mapping[str, Any]]:
    """Fewest ranks a model first, then less memory in exchange for time."""
    if not machine.gpus:
        for tokens in (65536, 32768, 16384, 8192):
            yield {"engine": {"count": 1, "max_total_tokens": tokens}, "data": 1}
        return
    for tensor in (1, 2, 4, 8):
        if machine.gpus % tensor:
            continue
        replicas = machine.gpus // tensor
        for saving in ({}, {"offload": "optimizer"}, {"offload": "optimizer", "recompute": "full"}):
            yield {
                "engine": {"count": replicas, "tensor": tensor},
                "data": replicas,
                "trainer": {"parallel": {"tensor": tensor, "data": replicas}, **saving},
            }


def _values(
    model: Path, problems: Problems, run: Path, machine: Machine, layout: Mapping[str, Any]
) -> dict[str, Any]:
    prompt = -(-problems.longest // _ROUND) * _ROUND
    response = _response_tokens(model, prompt, most=4096 if machine.gpus else 256)
    replicas = layout["data"]
    prompts = min(problems.rows, 64 if machine.gpus else 8) // replicas * replicas
    if not prompts:
        raise ConfigError(f"{problems.path} has {problems.rows} usable rows; {replicas} GPUs need {replicas}")
    pack = max(prompt + response, 16384 if machine.gpus else 2048)
    return {
        "out": str(run),
        "seed": 1,
        "steps": 100 if machine.gpus else 20,
        "model": {"path": str(model)},
        "data": {
            "train": str(problems.path),
            "columns": problems.columns,
            "prompts_per_step": prompts,
            "max_prompt_tokens": prompt,
            "bad_rows": "error" if problems.all_usable else "skip",
        },
        "sampling": {
            "segment_tokens": response // _DEPTH,
            "max_depth": _DEPTH,
            "width": 16 if machine.gpus else 8,
            "max_response_tokens": response,
        },
        "trainer": {**layout.get("trainer", {}), "max_tokens_per_pack": pack},
        "engine": layout["engine"],
        "plan": {
            "device": machine.device,
            "devices_per_node": max(machine.gpus, 1),
            "node_memory_gib": machine.memory_gib,
        },
    }


def _response_tokens(model: Path, prompt: int, most: int) -> int:
    """The most, as far as the model's positions go: a multiple of the depth."""
    positions = text_config(read_model_config(model)).get("max_position_embeddings")
    room = most if not isinstance(positions, int) else min(most, positions - prompt - _KEPT_FREE)
    if room < _LEAST_RESPONSE:
        raise ConfigError(
            f"{model} has {positions} positions, and the longest prompt takes up to {prompt} tokens: no room "
            f"for a response of {_LEAST_RESPONSE}"
        )
    return room // _DEPTH * _DEPTH


def render(config: RunConfig, problems: Problems, machine: Machine, file: Path) -> str:
    """The configuration as YAML with comments, which `treepo train` reads."""
    data, sampling, trainer, engine = config.data, config.sampling, config.trainer, config.engine
    most = engine.max_total_tokens
    kv = "" if most is None else f"\n  max_total_tokens: {most} # in the KV cache"
    skipped = " # rows that cannot be used are skipped" if data.bad_rows == "skip" else ""
    return f"""\
# Trains on {problems.rows} problems, laid out for {machine.name}.
#
#     treepo plan {_quoted(file)}     # memory and step time
#     treepo train {_quoted(file)}
#
# docs/configuration.md has every key with its meaning and default.

out: {_quoted(config.out)} # the run folder
seed: {config.seed}
steps: {config.steps}

model:
  path: {_quoted(config.model.path)}

data:
  train: {_quoted(problems.path)} # or a list of files with weights: docs/rewards.md
  columns: {json.dumps(problems.columns)} # which columns are prompt and answer; {{}} are those of TreePO_data
  # heldout: FILE # problems for accuracy before and after
  prompts_per_step: {data.prompts_per_step}
  max_prompt_tokens: {data.max_prompt_tokens} # the longest has {problems.longest}
  bad_rows: {data.bad_rows}{skipped}

sampling: # a tree of {sampling.width} leaves a prompt; paths branch every {sampling.segment_tokens} tokens
  segment_tokens: {sampling.segment_tokens}
  max_depth: {sampling.max_depth}
  max_response_tokens: {sampling.max_response_tokens}
  width: {sampling.width}
  branching: {sampling.branching}
  initial_branching: {sampling.initial_branching}
  temperature: {sampling.temperature}

learning:
  estimator: {config.learning.estimator}

trainer: # the planner found that this fits
  parallel: {{tensor: {trainer.parallel.tensor}, data: {trainer.parallel.data}}}
  max_tokens_per_pack: {trainer.max_tokens_per_pack}
  recompute: {trainer.recompute}
  offload: {trainer.offload}
  optimizer:
    learning_rate: {trainer.optimizer.learning_rate:.1e} # small models take more: 1.0e-5 to 2.0e-4

engine: # {engine.count} of {engine.tensor} device{"s" * (engine.tensor > 1)}
  count: {engine.count}
  tensor: {engine.tensor}{kv}

checkpoint:
  every: {config.checkpoint.every} # steps; --resume continues from the newest

plan: # what `treepo plan` assumes
  device: {config.plan.device}
  devices_per_node: {config.plan.devices_per_node}
  node_memory_gib: {config.plan.node_memory_gib:g}
"""


def _quoted(path: Path) -> str:
    """The path as YAML reads it, without quotes if it does not need them."""
    text = str(path)
    plain = re.fullmatch(r"[\w./-]+", text, re.ASCII) and read_value(text, "") == text
    return text if plain else json.dumps(text)
