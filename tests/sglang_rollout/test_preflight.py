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


QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "moe_intermediate_size": 1536,
    "max_position_embeddings": 40960,
}


@pytest.mark.parametrize(
    ("engine", "changes", "refused"),
    [
        ({"tensor": 16, "pipeline": 2, "expert": 8, "nodes": 4}, {}, None),
        ({"tensor": 8, "pipeline": 3}, {}, None),  # 31, 31 and 32 layers
        ({"tensor": 8, "expert": 8}, {"num_experts": 60}, "engine.expert = 8: .* has 60 experts"),
        ({"tensor": 2, "expert": 2}, {"model_type": "qwen3", "num_experts": None}, "has no experts"),
        ({"tensor": 64, "expert": 1}, {"moe_intermediate_size": 96}, "experts of 96 rows, which 64 ranks"),
        ({"tensor": 64, "expert": 64}, {"moe_intermediate_size": 96}, None),
        ({"pipeline": 95}, {}, "engine.pipeline = 95: .* has 94 layers; 1 to 94 are allowed"),
        ({"pipeline": 2}, {"model_type": "gpt2"}, 'model_type = "gpt2"; SGLang serves llama, mistral, qwen2'),
        ({"pipeline": 2}, {"model_type": "llama", "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"pipeline": 2}, {"model_type": "qwen3", "tie_word_embeddings": True}, None),
        ({"pipeline": 1}, {"model_type": "llama", "tie_word_embeddings": True}, None),
    ],
)
def test_a_model_is_divided_into_stages_and_parts_of_experts_as_sglang_can(
    tmp_path: Path, engine: dict[str, int], changes: dict[str, object], refused: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_MOE | changes))
    config = EngineConfig.model_validate(engine)
    if refused is None:
        check_engine(tmp_path, prompt=100, response=100, engine=config)
        return
    with pytest.raises(ConfigError, match=refused):
        check_engine(tmp_path, prompt=100, response=100, engine=config)
