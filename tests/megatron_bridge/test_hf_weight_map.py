"""The families' tables: every Hugging Face tensor is mapped once, and comes back bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_bridge.architecture import read_architecture, tensor_shapes
from megatron_bridge.hf_weight_map import FAMILIES, global_name

SIZES: dict[str, Any] = {
    "vocab_size": 37,  # not divisible by any number of ranks below
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
        **{**SIZES, "head_dim": 10},  # its signature does not name it
        moe_intermediate_size=12,
        num_experts=3,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "llama": LlamaConfig(**SIZES, head_dim=6),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=3,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "mistral": MistralConfig(**SIZES, head_dim=10, sliding_window=None),
    "llama, biased": LlamaConfig(**SIZES, attention_bias=True),
    "qwen3, biased": Qwen3Config(**SIZES, head_dim=10, attention_bias=True),
}


def test_every_family_has_a_config_here() -> None:
    assert {config.model_type for config in CONFIGS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_survives_the_round_trip_bit_for_bit(name: str, ranks: int, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    architecture = read_architecture(tmp_path)
    dimensions = architecture.dimensions
    assert tensor_shapes(architecture) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    back: dict[str, Tensor] = {}
    for rule in architecture.weight_rules():
        shards = rule.surgery.split([tensors[name] for name in rule.tensors], ranks, dimensions)
        assert len(shards) == ranks
        assert len({shard.shape for shard in shards}) == 1
        back |= zip(rule.tensors, rule.surgery.join(shards, dimensions), strict=True)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


def test_rules_have_the_names_of_the_whole_model() -> None:
    """A rank numbers its own layers and experts from 0."""
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
