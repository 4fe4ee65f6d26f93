"""Checks the values of a config.json of one of the trainer's families, before anyone computes with them.

transformers and SGLang take some odd values (null, text, negative numbers), and differ in what they make of
them. A key that is missing has the family's default.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treepo.data.model_config import CONFIG, shown, wrong_value
from treepo.errors import ModelError


def check_values(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError with file, key and value for the first one that no model can have."""
    for key, rule in _RULES.items():
        if key in config:
            rule(folder, key, config[key])
    _check_heads(folder, config)
    _check_rope(folder, config)


Rule = Callable[[Path, str, Any], None]


def _refuse(folder: Path, key: str, value: object, needed: str) -> None:
    raise ModelError(f"{folder / CONFIG}: {wrong_value(key, value, needed)}")


def _whole(least: int, most: int, null: bool = False) -> Rule:
    """A whole number; or null, if the families have a default for it."""

    def check(folder: Path, key: str, value: Any) -> None:
        if value is None and null:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            _refuse(
                folder, key, value, f"a whole number from {least} to {most}" + (" or null" if null else "")
            )

    return check


def _number(folder: Path, key: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        _refuse(folder, key, value, "a number above 0")


def _share(folder: Path, key: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        _refuse(folder, key, value, "a number from 0 to below 1")


def _truth(folder: Path, key: str, value: Any) -> None:
    if not isinstance(value, bool):
        _refuse(folder, key, value, "true or false")


def _layer_list(folder: Path, key: str, value: Any) -> None:
    whole = isinstance(value, list) and all(
        isinstance(layer, int) and not isinstance(layer, bool) for layer in value
    )
    if value is not None and not whole:
        _refuse(folder, key, value, "a list of layers")


def _text(folder: Path, key: str, value: Any) -> None:
    if not isinstance(value, str):
        _refuse(folder, key, value, "a name")


_RULES: Mapping[str, Rule] = {
    "vocab_size": _whole(1, 1 << 24),
    "hidden_size": _whole(1, 1 << 20),
    "intermediate_size": _whole(1, 1 << 22),
    "num_hidden_layers": _whole(1, 1 << 10),
    "num_attention_heads": _whole(1, 1 << 12),
    "num_key_value_heads": _whole(1, 1 << 12, null=True),
    "head_dim": _whole(1, 1 << 12, null=True),
    "max_position_embeddings": _whole(1, 1 << 30),
    "moe_intermediate_size": _whole(1, 1 << 22),
    "shared_expert_intermediate_size": _whole(1, 1 << 22),
    "num_experts": _whole(0, 1 << 12),
    "num_local_experts": _whole(0, 1 << 12),  # as transformers 5 writes it
    "num_experts_per_tok": _whole(1, 1 << 12),
    "decoder_sparse_step": _whole(1, 1 << 10),
    "mlp_only_layers": _layer_list,
    "rms_norm_eps": _share,
    "attention_dropout": _share,
    "initializer_range": _share,
    "rope_theta": _number,
    "hidden_act": _text,
    "tie_word_embeddings": _truth,
    "use_sliding_window": _truth,
    "attention_bias": _truth,
    "qkv_bias": _truth,
    "mlp_bias": _truth,
    "norm_topk_prob": _truth,
}


def _check_heads(folder: Path, config: Mapping[str, Any]) -> None:
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    hidden, head_dim = config.get("hidden_size"), config.get("head_dim")
    if heads and groups and heads % groups:
        _refuse(folder, "num_key_value_heads", groups, f"a divisor of num_attention_heads = {heads}")
    if heads and hidden and head_dim is None and hidden % heads:
        _refuse(folder, "num_attention_heads", heads, f"a divisor of hidden_size = {hidden} without head_dim")
    experts = config.get("num_local_experts", config.get("num_experts"))
    per_token = config.get("num_experts_per_tok")
    if experts and per_token and per_token > experts:
        _refuse(folder, "num_experts_per_tok", per_token, f"at most the {experts} experts")


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def _check_rope(folder: Path, config: Mapping[str, Any]) -> None:
    """Older versions of transformers wrote `rope_scaling` for `rope_parameters`."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            _refuse(folder, name, rope, "an object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        _text(folder, f"{name}.rope_type", kind)
        needed = _LLAMA3 if kind == "llama3" else ()
        for key in dict.fromkeys((*needed, "factor", "rope_theta", "original_max_position_embeddings")):
            if key in rope:
                _number(folder, f"{name}.{key}", rope[key])
            elif key in needed:
                raise ModelError(f"{folder / CONFIG}: {name} = {shown(rope)}; rope_type = {kind} needs {key}")
        if needed and rope["low_freq_factor"] >= rope["high_freq_factor"]:
            low = rope["low_freq_factor"]
            _refuse(
                folder, f"{name}.low_freq_factor", low, f"below high_freq_factor = {rope['high_freq_factor']}"
            )
