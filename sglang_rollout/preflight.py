"""What would stop an engine, found before one is started: a folder's weights, and lengths that do not fit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_rollout.tensor_parallel import check_tensor
from sglang_rollout.weights import checkpoint_shapes
from treepo.config.engine import EngineConfig
from treepo.errors import ConfigError, ModelError

_KEPT_FREE = 6
"""SGLang 0.5.16's max_req_input_len is the smaller of positions and KV tokens, less 1 and less 5."""


def check_engine(folder: Path, prompt: int, response: int, engine: EngineConfig) -> None:
    """Any family that SGLang knows may sample, so only weights' headers and lengths are looked at.

    folder: a model folder with a config.json. prompt, response: most tokens of one of each. Raises ModelError
    or ConfigError.
    """
    checkpoint_shapes(folder)
    check_tensor(folder, engine.tensor)
    config = json.loads((folder / "config.json").read_text())
    _check_layers(folder, config)
    positions = config.get("max_position_embeddings")
    total = prompt + response
    for limit, name in (
        (positions, f"{folder} has {positions} positions (max_position_embeddings in config.json)"),
        (engine.max_total_tokens, f"engine.max_total_tokens = {engine.max_total_tokens}"),
    ):
        if limit is not None and total > limit - _KEPT_FREE:
            raise ConfigError(
                f"data.max_prompt_tokens + the longest response = {prompt} + {response} = {total}, "
                f"but {name}, of which SGLang keeps {_KEPT_FREE} free: {limit - _KEPT_FREE} are allowed"
            )


def _check_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """SGLang 0.5.16 gives experts to every layer of these models, whatever their configuration says."""
    if config.get("model_type") not in ("qwen2_moe", "qwen3_moe"):
        return
    for name, allowed in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if (found := config.get(name, allowed)) != allowed:
            raise ModelError(
                f"{folder}: {name} = {found} in config.json; SGLang serves such models with {allowed} only"
            )
