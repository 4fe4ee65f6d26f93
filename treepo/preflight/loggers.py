"""Checks that the packages of a run's loggers are installed, without importing them."""

import importlib.util

from treepo.config.run import RunConfig
from treepo.errors import ConfigError


def check_loggers(config: RunConfig) -> None:
    """Raise ConfigError unless the package of every logger in `logging` is installed."""
    for name in ("wandb", "mlflow"):  # TensorBoard is always there
        if name in config.logging and not _is_installed(name):
            raise ConfigError(f"logging: {name} is not installed; pip install 'treepo[{name}]'")


def _is_installed(name: str) -> bool:
    """Whether it can be imported. A folder of that name, as W&B makes for its runs, is no package."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
