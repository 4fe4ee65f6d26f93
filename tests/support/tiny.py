"""Random models of a few hundred thousand parameters, written as Hugging Face folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def write_tiny_qwen2(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A Qwen2 with grouped queries and biases far from 0; `overrides` are Qwen2Config's."""
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return _write(Qwen2ForCausalLM, Qwen2Config(**(settings | overrides), dtype="float32"), folder, seed)


def write_tiny_qwen3_moe(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A Qwen3-MoE whose second layer is dense; `overrides` are Qwen3MoeConfig's."""
    settings: dict[str, Any] = {**_MIXTURE, "head_dim": 12, **overrides}
    return _write(Qwen3MoeForCausalLM, Qwen3MoeConfig(**settings, dtype="float32"), folder, seed)


def write_tiny_qwen2_moe(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A Qwen2-MoE with a shared expert, whose second layer is dense; `overrides` are Qwen2MoeConfig's."""
    settings: dict[str, Any] = {**_MIXTURE, "shared_expert_intermediate_size": 40, **overrides}
    return _write(Qwen2MoeForCausalLM, Qwen2MoeConfig(**settings, dtype="float32"), folder, seed)


_MIXTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def _write(kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
