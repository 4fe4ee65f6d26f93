"""Fills in `sampling` from the model's generation_config.json, if `sampling.from_model` asks for it."""

import asyncio
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from treepo.config.evaluate import EvalConfig
from treepo.config.rollout import RolloutConfig
from treepo.data.model_config import GENERATION_CONFIG, read_json_object
from treepo.errors import ConfigError, ModelError, one_line, shown
from treepo.preflight.inputs import tokenizer_folder

_KEYS = ("temperature", "top_p", "top_k", "min_p")
# Recommended too, and not applied: each with the value that changes nothing.
_OTHERS = {"repetition_penalty": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
_log = logging.getLogger(__name__)


def rollout_as_recommended(config: RolloutConfig) -> RolloutConfig:
    """The configuration, with the sampling of its model if it asks for that. Raises TreepoError."""
    return _filled(config, config.model.path) if config.sampling.from_model else config


def evaluation_as_recommended(config: EvalConfig) -> EvalConfig:
    """As `rollout_as_recommended`; the folder of a running server's model must be on this machine."""
    if not config.sampling.from_model:
        return config
    folder = config.model.path or config.model.tokenizer
    if folder is None:
        from sglang_rollout.http_engine import server_facts

        assert config.model.url is not None
        folder = tokenizer_folder(config.model.url, asyncio.run(server_facts(config.model.url)))
    return _filled(config, folder)


def _filled[C: (RolloutConfig, EvalConfig)](config: C, folder: Path) -> C:
    path, given = folder / GENERATION_CONFIG, config.sampling.model_fields_set
    recommended = {key: value for key, value in _recommended(path).items() if key not in given}
    _log.info("sampling as %s recommends: %s", path, recommended)
    values = config.model_dump()
    values["sampling"] |= recommended
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        message = one_line(fault["msg"].removeprefix("Value error, "))
        raise ConfigError(
            f"sampling.from_model: {path} recommends {_words(recommended)}: "
            f"{'.'.join(map(str, fault['loc']))}: {message}"
        ) from None


def _recommended(path: Path) -> dict[str, Any]:
    """The file's values of `_KEYS`, as the configuration writes them."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file, and sampling.from_model takes its values from it")
    content = read_json_object(path)
    found = {key: content[key] for key in _KEYS if content.get(key) is not None}
    if not found:
        raise ModelError(f"{path}: none of {', '.join(_KEYS)}, which sampling.from_model takes from it")
    if found.get("top_k") in (0, -1):  # transformers' and others' way to write all tokens
        found["top_k"] = None
    for key, neutral in _OTHERS.items():
        if content.get(key, neutral) not in (None, neutral):
            _log.warning("%s also recommends %s = %s, which is not applied", path, key, shown(content[key]))
    return found


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {shown(value)}" for key, value in values.items())
