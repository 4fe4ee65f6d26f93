"""GGUF files of small models, written as llama.cpp writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
MERGES = ["1 2", "12 3", "123 4", "Ġ t", "h e", "Ġt he", "l l"]
_SPECIAL = ["<|text|>", "<|start|>", "<|end|>"]
TOKENS = [
    *_SPECIAL,
    *sorted(ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    "<user>",
    "[PAD]",
]
_NORMAL = len(TOKENS) - len(_SPECIAL) - 2
TYPES = [3] * len(_SPECIAL) + [1] * _NORMAL + [4, 5]  # control, normal, user's, unused

_SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, head_dim=8, rms_norm_eps=1e-5),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),
    "qwen3moe": Qwen3MoeConfig(
        **{**_SIZES, "head_dim": 16},  # its signature does not name it
        moe_intermediate_size=32,
        num_experts=3,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
}
"""By GGUF's name of the architecture."""

_NAMES = (  # Hugging Face's and GGUF's, in this order
    ("model.layers.", "blk."),
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("lm_head.", "output."),
    ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.o_proj.", "attn_output."),
    ("self_attn.", "attn_"),
    ("mlp.experts.gate_proj.", "ffn_gate_exps."),
    ("mlp.experts.up_proj.", "ffn_up_exps."),
    ("mlp.experts.down_proj.", "ffn_down_exps."),
    ("mlp.gate.", "ffn_gate_inp."),
    ("mlp.", "ffn_"),
    ("_proj.", "."),
)
F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0


def write_model(folder: Path, architecture: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Save a random model as transformers does; return its tensors by name."""
    config = type(MODELS[architecture]).from_dict(MODELS[architecture].to_dict() | changes)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, torch.Tensor],
    kind: GGMLQuantizationType = F32,
    keys: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
) -> Path:
    """Write the tensors, matrices quantised as `kind`, with metadata of MODELS[architecture].

    keys: further metadata, or other values. drop: keys and tensors (their GGUF names) to leave out.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in (_metadata(architecture) | dict(keys or {})).items():
        if key not in drop:
            _add(writer, key, value)
    for name, tensor in _gguf_tensors(architecture, tensors).items():
        if name not in drop:
            values = tensor.numpy()
            of = kind if values.ndim > 1 else F32
            writer.add_tensor(name, quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(architecture: str) -> dict[str, Any]:
    config = MODELS[architecture]
    sizes = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **({} if architecture == "qwen2" else {"attention.key_length": config.head_dim}),
    }
    if architecture == "qwen3moe":
        sizes |= {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 32}
    return {
        "general.name": "small",
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add.get(type(value), writer.add_array)(key, value)


def _gguf_tensors(architecture: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """llama.cpp's names; its order of Llama's queries and keys; experts in one tensor."""
    experts: dict[str, list[torch.Tensor]] = {}
    found: dict[str, torch.Tensor] = {}
    config = MODELS[architecture]
    for name, tensor in tensors.items():
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            experts.setdefault(f"{before}.experts.{after.partition('.')[2]}", []).append(tensor)
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        found[name] = tensor
    found |= {name: torch.stack(each) for name, each in experts.items()}
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor.contiguous()
    return renamed


def cut(path: Path, size: int) -> Path:
    """Keep the first `size` bytes of the file."""
    path.write_bytes(path.read_bytes()[:size])
    return path


def quantised(tensor: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The float32 numbers that are left of the tensor."""
    return dequantize(quantize(tensor.numpy(), kind), kind)
