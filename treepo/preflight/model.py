"""Checks of the model that a command is about to use: its folder, and whether the engines can serve it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_rollout.preflight import check_engine
from treepo.config.engine import EngineConfig
from treepo.config.run import RunConfig
from treepo.errors import ConfigError


def check_trainer(config: RunConfig) -> None:
    """Raise ConfigError or ModelError if the trainer cannot divide or build the model."""
    # Seconds: torch.
    from megatron_bridge.architecture import check_layers, check_layout, read_architecture

    check_layout(read_architecture(config.model.path), config.trainer.parallel)
    check_layers(config.trainer.transformer_impl)


def check_served(folder: Path, prompt_tokens: int, response_tokens: int, engine: EngineConfig) -> None:
    check_engine(folder, prompt_tokens, response_tokens, engine)
