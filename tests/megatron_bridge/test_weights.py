"""The families' tables: tensor surgery is lossless, complete and what Megatron-Core's layout means."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_bridge.architecture import read_architecture
from megatron_bridge.rotary import cos_sin, inverse_frequency, rotate
from megatron_bridge.weights import (
    FAMILIES,
    GATE_UP,
    QKV,
    VOCABULARY,
    Dimensions,
    expand,
    global_name,
    padded_vocabulary,
)
from treepo.errors import ModelError

SIZES: dict[str, Any] = {
    "vocab_size": 37,  # leaves a remainder at every number of ranks tried
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=10),
    "qwen3_moe": Qwen3MoeConfig(
        **{**SIZES, "head_dim": 10},  # its constructor takes it, unnamed
        moe_intermediate_size=12,
        num_experts=3,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "llama": LlamaConfig(**SIZES, head_dim=6),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_survives_the_round_trip_bit_for_bit(family: str, ranks: int, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dimensions = read_architecture(tmp_path).dimensions
    back: dict[str, Tensor] = {}
    for rule in expand(FAMILIES[family].rules, dimensions):
        shards = rule.surgery.split([tensors[name] for name in rule.tensors], ranks, dimensions)
        assert len(shards) == ranks
        assert len({shard.shape for shard in shards}) == 1
        back |= zip(rule.tensors, rule.surgery.join(shards, dimensions), strict=True)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


def test_rules_have_the_names_of_the_whole_model() -> None:
    """A rank has its layers and experts under numbers of its own."""
    name = "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"
    assert global_name(name, [4, 6], 8) == "decoder.layers.6.mlp.experts.local_experts.8.linear_fc1.weight"
    fused = {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (
            "decoder.layers.4.input_layernorm.weight"
        ),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "decoder.layers.4.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.experts.linear_fc2.weight11": (
            "decoder.layers.6.mlp.experts.local_experts.19.linear_fc2.weight"
        ),
    }
    for engines, ours in fused.items():  # Transformer Engine's modules
        assert global_name(engines, [4, 6], 8) == ours
    for unnumbered in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"):
        assert global_name(unnumbered, [4, 6], 8) == unnumbered


def test_qkv_is_interleaved_by_group() -> None:
    """Two groups of two query heads, one row each: q0 q1 k0 v0 on one rank, q2 q3 k1 v1 on the other."""
    query, key, value = torch.arange(4)[:, None], torch.tensor([[10], [11]]), torch.tensor([[20], [21]])
    first, second = QKV.split([query, key, value], 2, Dimensions(1, 2, 1, 0))
    assert first.flatten().tolist() == [0, 1, 10, 20]
    assert second.flatten().tolist() == [2, 3, 11, 21]


def test_every_rank_has_its_rows_of_gate_and_up() -> None:
    gate, up = torch.arange(4)[:, None], torch.arange(10, 14)[:, None]
    first, second = GATE_UP.split([gate, up], 2, Dimensions(1, 1, 1, 0))
    assert first.flatten().tolist() == [0, 1, 10, 11]
    assert second.flatten().tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zeros() -> None:
    table = torch.arange(1, 6)[:, None]
    shards = VOCABULARY.split([table], 4, Dimensions(1, 1, 1, vocabulary=5))
    assert torch.cat(shards).flatten().tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert padded_vocabulary(8, 4) == 8


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["default", "llama3"],
)
def test_rotation_is_that_of_transformers(rope: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(**SIZES, head_dim=16, rope_parameters=rope, max_position_embeddings=4096)
    position = torch.tensor([0, 1, 2, 63, 64, 65, 1000, 4095])
    x = torch.randn(len(position), 3, 16)
    ours = rotate(x, *cos_sin(position, inverse_frequency(rope, 16), torch.float32))
    cos, sin = LlamaRotaryEmbedding(config)(x, position[None])
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    # Angles up to 4095 rad in float32 are known to 2.4e-4 rad; both sides round alike except for the last
    # bit of the frequency.
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=0, atol=2e-3)
    torch.testing.assert_close(ours[:6], theirs[0].transpose(0, 1)[:6], rtol=0, atol=2e-5)


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(ModelError, match="yarn"):
        inverse_frequency({"rope_type": "yarn", "rope_theta": 1e4}, 8)
