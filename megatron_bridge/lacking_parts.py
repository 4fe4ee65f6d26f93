"""Names what the trainer lacks for a model family that it does not train, so that a refusal says why.

Families that need only a table (`hf_weight_map.FAMILIES`) are not listed.
"""

from collections.abc import Mapping
from typing import Any

_LATENT = "multi-head latent attention"
_LINEAR = "linear attention"
_STATE_SPACE = "state-space layers"
_CONVOLUTION = "convolution layers"
_SLIDING = "sliding windows"
_POST_NORM = "norms after attention and MLP"
_INTERLEAVED = "interleaved rotary positions"
_PARTIAL = "partial rotary positions"
_ROUTER = "sigmoid routers with a correction bias"

REFUSED = {  # part: the families that need it, by `model_type`
    _LATENT: (
        *("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "longcat_flash", "minicpm3", "mistral4"),
        "youtu",
    ),
    f"{_LATENT} over selected tokens": ("deepseek_v32", "glm_moe_dsa"),
    "compressed sparse attention": ("deepseek_v4",),
    f"{_SLIDING} and attention sinks": ("gpt_oss",),
    _LINEAR: (
        *("kimi_linear", "minimax", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
        *("qwen3_5_text", "qwen3_next"),
    ),
    _STATE_SPACE: (
        *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h"),
        *("zamba", "zamba2"),
    ),
    _CONVOLUTION: ("lfm2", "lfm2_moe"),
    _SLIDING: ("afmoe", "exaone_moe", "mellum", "ministral"),
    f"{_SLIDING} and {_POST_NORM}": (
        *("exaone4", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        "olmo3",
    ),
    f"{_SLIDING} and {_INTERLEAVED}": ("cohere2", "cohere2_moe"),
    "chunked attention": ("llama4", "llama4_text"),
    "layers without rotary positions": ("smollm3",),
    "scaled embeddings and norms of one plus the weight": ("gemma",),
    _POST_NORM: ("olmo2",),
    f"{_INTERLEAVED} of a part of each head": ("glm",),
    f"{_INTERLEAVED} of a part of each head, and {_POST_NORM}": ("glm4",),
    _INTERLEAVED: ("cohere", "ernie4_5", "ernie4_5_moe", "helium"),
    _PARTIAL: ("phi", "stablelm"),
    f"{_PARTIAL} and {_ROUTER}": ("glm4_moe", "minimax_m2", "solar_open"),
    _ROUTER: ("dots1", "hy_v3"),
    "queries scaled by position, and YaRN": ("ministral3",),
    "multipliers of embeddings, attention, residuals and logits": ("granite", "granitemoe"),
}
_SIGNS = {  # keys of config.json that show the part in a family that is not named above
    "vision_config": "part for images",
    "audio_config": "part for sound",
    "kv_lora_rank": _LATENT,
    "index_topk": "attention to selected tokens",
    "linear_num_value_heads": _LINEAR,
    "linear_attn_config": _LINEAR,
    "mamba_d_state": _STATE_SPACE,
    "ssm_state_size": _STATE_SPACE,
    "attn_logit_softcapping": "caps of attention scores",
}


def lacking_part(config: Mapping[str, Any]) -> str | None:
    """The part that the trainer lacks for a model of this config.json; None if it is not known."""
    for part, families in REFUSED.items():
        if config["model_type"] in families:
            return part
    return next((part for key, part in _SIGNS.items() if config.get(key)), None)
