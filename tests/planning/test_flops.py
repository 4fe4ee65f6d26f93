"""Forward FLOPs against torch's count of transformers' model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_bridge.architecture import read_architecture
from treepo.planning.speed.flops import forward_flops

SIZES: dict[str, Any] = {
    "vocab_size": 509,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
    "head_dim": 12,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    # Every token goes to all experts, whatever the router says.
    "qwen3_moe": Qwen3MoeConfig(**(SIZES | EXPERTS)),
    "qwen2_moe": Qwen2MoeConfig(**(SIZES | EXPERTS), shared_expert_intermediate_size=40),
}
TOKENS = 40


@pytest.mark.parametrize("kind", CONFIGS)
def test_flops_are_those_of_the_matrix_products(kind: str, tmp_path: Path) -> None:
    """Exactly: eager attention multiplies all pairs; the rotary angles are one product with one column."""
    config = CONFIGS[kind]
    config.save_pretrained(tmp_path)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # which torch can count
    model = AutoModelForCausalLM.from_config(config, **eager, dtype=torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, TOKENS, dtype=torch.long))
    architecture = read_architecture(tmp_path)
    angles = TOKENS * architecture.dimensions.head_dim
    assert forward_flops(architecture, TOKENS, TOKENS**2) == counter.get_total_flops() - angles


def test_only_chosen_experts_count(tmp_path: Path) -> None:
    """Half the experts, half their products; the router computes all."""
    flops = []
    for chosen in (2, 4):
        folder = tmp_path / str(chosen)
        Qwen3MoeConfig(**{**SIZES, **EXPERTS, "num_experts_per_tok": chosen}).save_pretrained(folder)
        flops.append(forward_flops(read_architecture(folder), 1, 0))
    assert flops[1] - flops[0] == 2 * 2 * (2 * 3 * 64 * 24)  # layers, experts, a gated MLP
