"""Whether a model can be divided among an engine's tensor-parallel ranks."""

import json
from pathlib import Path

from treepo.errors import ConfigError


def check_tensor(model: Path, tensor: int) -> None:
    """Raises ConfigError unless `tensor` ranks get equal shares of the attention heads.

    Key-value heads may be fewer than ranks: each is then on several.
    """
    config = json.loads((model / "config.json").read_text())
    heads = config.get("num_attention_heads")
    if heads is None:
        return  # a family that names them otherwise: SGLang will say
    groups = config.get("num_key_value_heads") or heads
    if heads % tensor or (groups % tensor and tensor % groups):
        raise ConfigError(
            f"engine.tensor = {tensor}: {model} has {heads} attention heads and {groups} key-value heads, "
            "which cannot be divided among so many ranks"
        )
