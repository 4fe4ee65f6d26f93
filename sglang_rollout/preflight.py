"""Checks before an engine starts: the model's layers, how ranks divide it, lengths, and SGLang's arguments.

SGLang may serve families that the trainer does not know, so the checks read only config.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_rollout.arguments import check_sglang_arguments
from sglang_rollout.routes import experts_of
from treepo.config.engine import EngineConfig
from treepo.data.model_config import CONFIG, read_model_config, shown, text_config
from treepo.errors import ConfigError, ModelError

_KEPT_FREE = 6
"""SGLang 0.5.16's max_req_input_len is the smaller of positions and KV tokens, less 1 and less 5."""


def check_engine(folder: Path, prompt: int, response: int, engine: EngineConfig) -> None:
    """Raise ModelError or ConfigError if an engine could not serve the model in `folder` with these lengths.

    prompt, response: most tokens of one prompt and of one response.
    """
    config = text_config(read_model_config(folder))
    check_tensor(folder, config, engine.tensor)
    _check_experts(folder, config, engine)
    _check_stages(folder, config, engine.pipeline)
    _check_layers(folder, config)
    positions = _size(config, "max_position_embeddings")
    total = prompt + response
    _check_full_attention(folder, config, total)
    for limit, name in (
        (positions, f"{folder} has {positions} positions (max_position_embeddings in config.json)"),
        (engine.max_total_tokens, f"engine.max_total_tokens = {engine.max_total_tokens}"),
    ):
        if limit is not None and total > limit - _KEPT_FREE:
            raise ConfigError(
                f"data.max_prompt_tokens + the longest response = {prompt} + {response} = {total}, "
                f"but {name}, of which SGLang keeps {_KEPT_FREE} free: {limit - _KEPT_FREE} are allowed"
            )
    check_sglang_arguments(engine)


def check_tensor(folder: Path, config: Mapping[str, Any], tensor: int) -> None:
    """Raise ConfigError unless `tensor` ranks get equal shares of the attention heads of the model's
    `config`.

    If there are fewer key-value heads than ranks, each is on several ranks.
    """
    heads = _size(config, "num_attention_heads")
    if heads is None:
        return  # a family that names them differently: SGLang checks them itself
    groups = _size(config, "num_key_value_heads") or heads
    if heads % tensor or (groups % tensor and tensor % groups):
        raise ConfigError(
            f"engine.tensor = {tensor}: {folder} has {heads} attention heads and {groups} key-value heads, "
            f"which {tensor} ranks cannot share equally"
        )


def _check_experts(folder: Path, config: Mapping[str, Any], engine: EngineConfig) -> None:
    """Raise ConfigError unless `engine.expert` parts get equally many experts, and their ranks equal rows."""
    experts, parts = experts_of(config), engine.expert
    if parts > 1 and not experts:
        raise ConfigError(f"engine.expert = {parts}: {folder} has no experts; 1 is allowed")
    if experts % parts:
        raise ConfigError(
            f"engine.expert = {parts}: {folder} has {experts} experts, which {parts} parts cannot share "
            "equally"
        )
    rows, sharers = _size(config, "moe_intermediate_size"), engine.tensor // parts
    if experts and rows is not None and rows % sharers:
        raise ConfigError(
            f"engine.tensor / engine.expert = {engine.tensor} / {parts} = {sharers}: {folder} has experts of "
            f"{rows} rows, which {sharers} ranks cannot share equally"
        )


def _check_stages(folder: Path, config: Mapping[str, Any], stages: int) -> None:
    """Raise ConfigError unless SGLang can serve the model in `stages` pipeline stages."""
    if stages == 1:
        return
    layers, family = _size(config, "num_hidden_layers"), config.get("model_type")
    if layers is not None and stages > layers:
        raise ConfigError(
            f"engine.pipeline = {stages}: {folder} has {layers} layers; 1 to {layers} are allowed"
        )
    if family not in _STAGED:
        raise ConfigError(
            f"engine.pipeline = {stages}: {folder} has model_type = {shown(family)}; SGLang serves "
            f"{', '.join(_STAGED)} in stages"
        )
    if config.get("tie_word_embeddings") and family not in _STAGED_IF_TIED:
        raise ConfigError(
            f"engine.pipeline = {stages}: {folder} has tie_word_embeddings, and SGLang's last stage has no "
            f"embedding; {', '.join(_STAGED_IF_TIED)} work"
        )


def _size(config: Mapping[str, Any], key: str) -> int | None:
    """A size that the config has as one number; some families have a list, or another key."""
    value = config.get(key)
    return value if isinstance(value, int) else None


def _check_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """SGLang 0.5.16 gives experts to every layer of these families, whatever their configuration says."""
    if config.get("model_type") not in ("qwen2_moe", "qwen3_moe"):
        return
    for name, allowed in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if (found := config.get(name, allowed)) != allowed:
            raise ModelError(
                f"{folder}: {name} = {shown(found)} in {CONFIG}; SGLang serves such models with "
                f"{shown(allowed)} only"
            )


_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
_STAGED = (*_LLAMA_LIKE, "deepseek_v2", "deepseek_v3")
"""Families whose classes in SGLang 0.5.16 pass hidden states from stage to stage."""
_STAGED_IF_TIED = ("qwen2", "qwen3")
"""Those whose last stage takes its output layer from the embedding's weights."""
_WINDOW = 4096  # of these families in transformers, if config.json has none


def _check_full_attention(folder: Path, config: Mapping[str, Any], total: int) -> None:
    """SGLang 0.5.16 gives these families full attention and SiLU, whatever their configuration says."""
    family = config.get("model_type")
    if family not in _LLAMA_LIKE:
        return
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ModelError(f"{folder / CONFIG}: hidden_act = {shown(activation)}; SGLang serves silu only")
    window = config.get("sliding_window", _WINDOW)
    slides = family == "mistral" or (family != "llama" and config.get("use_sliding_window") is True)
    if slides and window is not None and total > window:
        raise ModelError(
            f"{folder / CONFIG}: sliding_window = {shown(window)}; SGLang attends to the whole context "
            f"instead, so data.max_prompt_tokens + the longest response = {total} must be at most "
            f"{shown(window)}"
        )
