"""The checks of a model folder before an engine starts."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sglang_rollout.preflight import check_engine, check_tensor
from treepo.config.engine import EngineConfig
from treepo.errors import ConfigError, ModelError


@pytest.mark.parametrize(
    ("heads", "groups", "fit"),
    [(28, 4, [1, 2, 4]), (64, 8, [1, 2, 4, 8, 16]), (14, 2, [1, 2, 14]), (12, None, [1, 2, 3, 4, 6, 12])],
)
def test_a_model_is_divided_only_among_equal_ranks(
    tmp_path: Path, heads: int, groups: int | None, fit: list[int]
) -> None:
    config = {"num_attention_heads": heads} | ({"num_key_value_heads": groups} if groups else {})
    for tensor in range(1, 17):
        if tensor in fit:
            check_tensor(tmp_path, config, tensor)
        else:
            with pytest.raises(ConfigError, match=f"engine.tensor = {tensor}: .* {heads} attention heads"):
                check_tensor(tmp_path, config, tensor)


@pytest.mark.parametrize(
    ("layers", "refused"),
    [
        ({}, None),
        ({"mlp_only_layers": [], "decoder_sparse_step": 1}, None),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ],
)
def test_an_architecture_that_sglang_would_serve_otherwise_is_refused(
    tmp_path: Path, layers: dict[str, object], refused: str | None
) -> None:
    save_file({"a": np.zeros(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_attention_heads": 4, "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config | layers))
    if refused is None:
        check_engine(tmp_path, prompt=100, response=100, engine=EngineConfig())
        return
    with pytest.raises(ModelError, match=refused):
        check_engine(tmp_path, prompt=100, response=100, engine=EngineConfig())
