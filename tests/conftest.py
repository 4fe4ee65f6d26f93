"""Fixtures that many tests share."""

from pathlib import Path

import pytest
from tiny import write_tiny_qwen2


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 folder (no tokenizer)."""
    return write_tiny_qwen2(tmp_path_factory.mktemp("tiny"))
