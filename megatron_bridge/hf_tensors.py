"""Compares the tensors of a Hugging Face folder with its config.json, by name, shape and dtype.

The trainer and SGLang find a tensor by its exact name. SGLang skips a name that it does not know, and samples
from a parameter that no tensor has filled.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_bridge.architecture import Architecture, tensor_shapes
from treepo.data.model_config import CONFIG, read_model_config
from treepo.data.weight_headers import TensorHeader, read_weight_headers
from treepo.errors import ModelError

_OUTPUT = "lm_head.weight"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names and torch's


def check_tensors(folder: Path, architecture: Architecture, one_dtype: bool = False) -> None:
    """Raise ModelError unless the folder has exactly the tensors of its `architecture`, in their shapes.

    An output layer that is tied to the embedding may be stored again. one_dtype: all tensors must be of one.
    """
    headers = read_weight_headers(folder)
    if architecture.tied:
        headers.pop(_OUTPUT, None)
    dimensions = architecture.dimensions
    _check_count(folder, headers, _LAYER, "num_hidden_layers", dimensions.layers)
    if dimensions.experts:
        key = "num_local_experts" if "num_local_experts" in read_model_config(folder) else "num_experts"
        _check_count(folder, headers, _EXPERT, key, dimensions.experts)
    expected = tensor_shapes(architecture)
    for name in expected:
        if name not in headers:
            why = " and tie_word_embeddings = false" if name == _OUTPUT else ""
            raise ModelError(
                f"{folder}: no file has {name}, though {CONFIG} says model_type = "
                f"{architecture.model_type}{why}"
            )
    for name, header in headers.items():
        if name not in expected:
            raise ModelError(
                f"{folder}: {header.file} has {name}, which no model with this {CONFIG} has (model_type = "
                f"{architecture.model_type}); the folder must hold the model alone"
            )
        if header.shape != expected[name]:
            raise ModelError(
                f"{folder}: {name} has shape {list(header.shape)} in {header.file}, but "
                f"{list(expected[name])} by {CONFIG} ({_sizes(name, architecture)})"
            )
        if header.dtype not in DTYPES:
            raise ModelError(
                f"{folder}: {name} is {header.dtype} in {header.file}; {', '.join(DTYPES)} are supported"
            )
    if one_dtype and len(dtypes := {header.dtype: name for name, header in headers.items()}) > 1:
        found = ", ".join(f"{DTYPES[dtype]} ({name})" for dtype, name in sorted(dtypes.items()))
        raise ModelError(f"{folder}: its tensors have several dtypes: {found}; one is needed")


def _check_count(
    folder: Path, headers: Mapping[str, TensorHeader], pattern: re.Pattern[str], key: str, count: int
) -> None:
    """Check layers or experts first: a wrong count explains every tensor that is missing or too many."""
    found = {name: int(match[1]) for name in headers if (match := pattern.search(name))}
    if not found and pattern is _LAYER:
        raise ModelError(
            f"{folder}: no tensor is named model.layers.0..., as those of a model alone are; the first is "
            f"{min(headers)}"
        )
    most = max(found.values(), default=-1) + 1
    if most != count:
        last = next((name for name, number in found.items() if number == most - 1), "none")
        raise ModelError(
            f"{folder}: {key} = {count} in {CONFIG}, but the weights have {most} (the last has {last})"
        )


def _sizes(name: str, architecture: Architecture) -> str:
    """The keys and values of config.json that give a tensor's shape."""
    dimensions = architecture.dimensions
    module = name.split(".")[-2]
    sizes: dict[str, object] = {}
    if module in ("embed_tokens", "lm_head"):
        sizes["vocab_size"] = dimensions.vocabulary
    elif module in ("q_proj", "o_proj"):
        sizes["num_attention_heads"] = architecture.heads
    elif module in ("k_proj", "v_proj"):
        sizes["num_key_value_heads"] = dimensions.groups
    elif module == "gate":
        sizes["num_experts"] = dimensions.experts
    elif ".experts." in name and architecture.experts is not None:
        sizes["moe_intermediate_size"] = architecture.experts.intermediate
    elif ".shared_expert." in name and architecture.experts is not None:
        sizes["shared_expert_intermediate_size"] = architecture.experts.shared
    elif ".mlp." in name and module != "shared_expert_gate":
        sizes["intermediate_size"] = architecture.intermediate
    if ".self_attn." in name:
        sizes["head_dim"] = dimensions.head_dim
    if not module.endswith(("q_norm", "k_norm")) and not name.endswith(".bias"):
        sizes["hidden_size"] = architecture.hidden
    return ", ".join(f"{key} = {value}" for key, value in sizes.items())
