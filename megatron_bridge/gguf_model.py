"""Reads a GGUF file, llama.cpp's format, as a Hugging Face model: config, tokenizer, tensors one at a time.

Quantised weights become the float32 numbers that llama.cpp computes with, exactly. Metadata or a tensor that
would be lost, such as the rotary scaling of Llama 3.1, is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_bridge.architecture import Architecture, read_architecture, tensor_shapes
from megatron_bridge.gguf_header import GgufHeader, GgufTensor, Value, read_gguf_header
from megatron_bridge.gguf_tokenizer import gguf_tokenizer, token_id
from treepo.data.model_config import CONFIG, GENERATION_CONFIG
from treepo.errors import ModelError

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
"""GGUF's names of the architectures, and config.json's `model_type`."""

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_NEEDED = ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_HEAD_SIZES = ("attention.value_length", "rope.dimension_count")  # the trainer has one size of a head

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
_EXPERTS = "_exps."  # in the name of a tensor that holds one matrix for each expert
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)(?P<kind>\.weight|\.bias)")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """An opened file. Its tensors are all that its architecture needs, in the right shapes."""

    path: Path
    header: GgufHeader
    architecture: Architecture

    @property
    def tensor_count(self) -> int:
        """How many tensors `tensors` yields."""
        return len(tensor_shapes(self.architecture))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face tensor with its name, float32. Memory holds one tensor of the file."""
        content = np.memmap(self.path, np.uint8, "r")
        for name, tensor in self.header.tensors.items():
            weights = torch.from_numpy(_float32(content, tensor))
            if self.header.metadata["general.architecture"] == "llama":
                weights = self._with_halves(name, weights)
            of_experts = weights if _EXPERTS in name else (weights,)
            yield from zip(_hugging_face_names(name, tensor), of_experts, strict=True)

    def _with_halves(self, name: str, weights: Tensor) -> Tensor:
        """Queries and keys of Llama: llama.cpp rotates neighbours, Hugging Face the two halves of a head."""
        dimensions = self.architecture.dimensions
        heads = {"attn_q": self.architecture.heads, "attn_k": dimensions.groups}.get(name.split(".")[-2])
        if heads is None:
            return weights
        return weights.view(heads, -1, 2, *weights.shape[1:]).transpose(1, 2).reshape(weights.shape)


def open_gguf(path: Path, folder: Path) -> GgufModel:
    """Read the file's header, and write config, generation config and tokenizer to the empty `folder`.

    Raises ModelError for what is broken, or what no model of the trainer's families has.
    """
    header = read_gguf_header(path)
    _check_kind(path, header)
    config = _config(path, header)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    try:
        architecture = read_architecture(folder)
    except ModelError as error:
        reason = str(error).removeprefix(f"{folder / CONFIG}: ")
        raise ModelError(f"{path}: its metadata make a {CONFIG} that is not valid: {reason}") from error
    _check_tensors(path, header, architecture)
    tokenizer = gguf_tokenizer(path, header.metadata, config["max_position_embeddings"])
    tokenizer.save_pretrained(folder)
    generation = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    (folder / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2), encoding="utf-8")
    return GgufModel(path, header, architecture)


def _check_kind(path: Path, header: GgufHeader) -> None:
    metadata = header.metadata
    found = metadata.get("general.architecture")
    if found not in _FAMILIES:
        raise ModelError(
            f"{path}: general.architecture = {found!r} is not supported; {', '.join(_FAMILIES)} are"
        )
    if metadata.get("general.type", "model") != "model":
        raise ModelError(f"{path}: general.type = {metadata['general.type']!r}; a whole model is needed")
    if metadata.get("split.count", 0) not in (0, 1):
        raise ModelError(
            f"{path}: one of {metadata['split.count']} files; merge them first (llama-gguf-split --merge)"
        )


def _config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The content of config.json. Every key of the architecture has a place in it, or is an error."""
    metadata = header.metadata
    architecture = str(metadata["general.architecture"])
    model_type = _FAMILIES[architecture]
    values = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    keys = _KEYS | (_EXPERT_KEYS if model_type == "qwen3_moe" else {})
    for needed in _NEEDED:
        if needed not in values:
            raise ModelError(f"{path}: {architecture}.{needed} is missing")
    if _EMBEDDING not in header.tensors:
        raise ModelError(f"{path}: the tensor {_EMBEDDING} is missing")
    config = {keys[key]: values.pop(key) for key in keys if key in values}
    rope_theta = values.pop("rope.freq_base", 10000.0)
    vocabulary = header.tensors[_EMBEDDING].shape[0]
    _check_rest(path, architecture, values, config, vocabulary)
    return config | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "tie_word_embeddings": _OUTPUT not in header.tensors,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "dtype": "float32",
        **({"norm_topk_prob": True, "decoder_sparse_step": 1} if model_type == "qwen3_moe" else {}),
        **_token_ids(path, metadata),
    }


def _check_rest(
    path: Path, architecture: str, values: dict[str, Any], config: dict[str, Any], vocabulary: int
) -> None:
    """Check the keys that repeat a size; any other changes the model in a way that config.json does not."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        config.setdefault("head_dim", hidden // heads)
    expected = dict.fromkeys(_HEAD_SIZES, config.get("head_dim")) | {
        "vocab_size": vocabulary,
        "rope.scaling.type": "none",
    }
    for key, value in values.items():
        if key not in expected:
            raise ModelError(f"{path}: {architecture}.{key} = {value!r} is not supported")
        if value != expected[key]:
            raise ModelError(f"{path}: {architecture}.{key} = {value!r}; only {expected[key]!r} is supported")


def _token_ids(path: Path, metadata: Mapping[str, Value]) -> dict[str, Any]:
    """BOS, padding, and every token that ends a sequence: of the text, and of a turn."""
    bos, padding, *ends = (token_id(path, metadata, name) for name in ("bos", "padding", "eos", "eot", "eom"))
    named = sorted({end for end in ends if end is not None})
    eos = named[0] if len(named) == 1 else named or None
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": padding}
    return {key: value for key, value in ids.items() if value is not None}


def _check_tensors(path: Path, header: GgufHeader, architecture: Architecture) -> None:
    """Raise ModelError unless the file has exactly the architecture's tensors."""
    expected = tensor_shapes(architecture)
    found: set[str] = set()
    for name, tensor in header.tensors.items():
        shape = tensor.shape[1:] if _EXPERTS in name else tensor.shape
        for each in _hugging_face_names(name, tensor):
            if each not in expected:
                raise ModelError(f"{path}: the tensor {name} is not supported ({architecture.model_type})")
            if shape != expected[each]:
                raise ModelError(
                    f"{path}: the tensor {name} has shape {list(shape)}, but {list(expected[each])} by the "
                    "metadata"
                )
            found.add(each)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.kind][1]), np.uint8), tensor.kind)  # one block
        except NotImplementedError:
            raise ModelError(
                f"{path}: the tensor {name} is {tensor.kind.name}, which the package gguf cannot dequantise"
            ) from None
    if missing := [name for name in expected if name not in found]:
        raise ModelError(f"{path}: {len(missing)} tensors are missing, the first for {missing[0]}")


def _hugging_face_names(name: str, tensor: GgufTensor) -> list[str]:
    """The Hugging Face tensors that the file's tensor holds: several for one of experts, none if unknown."""
    match = _NAME.fullmatch(name)
    if match is None or match["module"] not in _NAMES:
        return [name]  # in no architecture
    place = f"model.layers.{match['layer']}." if match["layer"] else ""
    hugging_face = place + _NAMES[match["module"]] + match["kind"]
    if "{expert}" not in hugging_face:
        return [hugging_face]
    return [hugging_face.format(expert=expert) for expert in range(tensor.shape[0])]


def _float32(content: np.ndarray, tensor: GgufTensor) -> np.ndarray:
    """The tensor's values: float32, of its shape, in memory of their own."""
    stored = content[tensor.start : tensor.start + tensor.bytes].reshape(*tensor.shape[:-1], -1)
    return np.array(dequantize(stored, tensor.kind), dtype=np.float32).reshape(tensor.shape)
