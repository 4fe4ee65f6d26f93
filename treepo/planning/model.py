"""Where a plan reads the model's shape."""

from pathlib import Path

from treepo.config.run import RunConfig
from treepo.errors import ConfigError


def model_folder(config: RunConfig) -> Path:
    """The folder whose config.json a plan reads. Raises ConfigError where there is none."""
    if (config.model.path / "config.json").is_file():
        return config.model.path
    given = config.plan.architecture
    if given is None:
        raise ConfigError(
            f"model.path: {config.model.path} has no config.json; where the model is not at hand, "
            "plan.architecture may name a folder with its config.json"
        )
    if not (given / "config.json").is_file():
        raise ConfigError(f"plan.architecture: {given} has no config.json")
    return given
