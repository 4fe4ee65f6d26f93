"""What can be known to be wrong before anything is started, without torch, transformers or Ray."""

import json
from pathlib import Path
from typing import Any

from treepo.config.schema import RunConfig
from treepo.data import check_prompts
from treepo.errors import ConfigError, ModelError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_inputs(config: RunConfig) -> None:
    """Raises ConfigError, DataError or ModelError for the first thing that would fail later."""
    _check_model(config)
    check_prompts(config.data.train, config.data.columns, config.data)
    if config.data.heldout is not None:
        check_prompts(config.data.heldout, config.data.heldout_columns, config.data)


def _check_model(config: RunConfig) -> None:
    folder = config.model.path
    if not folder.is_dir():
        raise ModelError(f"model.path: {folder}: no such folder")
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder}: no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)}")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no weights, expected *.safetensors")
    model = _model_config(folder)
    longest = config.data.max_prompt_tokens + config.sampling.max_response_tokens
    if longest > model["max_position_embeddings"]:
        raise ConfigError(
            f"data.max_prompt_tokens + sampling.max_response_tokens = {config.data.max_prompt_tokens} + "
            f"{config.sampling.max_response_tokens} = {longest}, but {folder} has positions for "
            f"{model['max_position_embeddings']} tokens (config.json, max_position_embeddings)"
        )
    _check_layout(config, model)


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        model = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    needed = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "max_position_embeddings")
    if missing := [name for name in needed if name not in model]:
        raise ModelError(f"{path}: {', '.join(missing)}: required, but not given")
    return model


def _check_layout(config: RunConfig, model: dict[str, Any]) -> None:
    parallel = config.actor.parallel
    for key, ranks, name in (
        ("tensor", parallel.tensor, "num_attention_heads"),
        ("tensor", parallel.tensor, "num_key_value_heads"),
        ("pipeline", parallel.pipeline, "num_hidden_layers"),
    ):
        if model[name] % ranks:
            raise ConfigError(
                f"actor.parallel.{key} = {ranks} does not divide the model's {name} = {model[name]}"
            )
