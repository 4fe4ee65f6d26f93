"""A small run for plans, changed key by key, and its engine's memory."""

from pathlib import Path
from typing import Any

from treepo.config.run import RunConfig
from treepo.planning.hardware import GIB
from treepo.planning.memory.engine import EngineMemory, engine_memory


def config(**settings: Any) -> RunConfig:
    """Settings of a key such as `engine_tensor` go into their section."""
    values: dict[str, Any] = {
        "out": "runs/x",
        "steps": 1,
        "model": {"path": "model"},
        "data": {"train": "train.jsonl", "prompts_per_step": 32, "max_prompt_tokens": 32},
        "sampling": {"segment_tokens": 16, "max_depth": 6, "max_response_tokens": 96, "width": 8},
        "plan": {"response_tokens": 40.0},
    }
    for name, value in settings.items():
        section, _, key = name.partition("_")
        values[section] = (values.get(section, {}) | {key: value}) if key else value
    return RunConfig.model_validate(values)


def engine(config: RunConfig, folder: Path, free: float = 1.0 * GIB) -> EngineMemory:
    return engine_memory(config, folder, free)
