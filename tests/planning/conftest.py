"""Folders of tiny models with a vocabulary of 130 tokens."""

from pathlib import Path

import pytest

from tests.support.tiny import write_tiny_qwen2, write_tiny_qwen2_moe, write_tiny_qwen3_moe


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("qwen2"), vocab_size=130)


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), vocab_size=130)


@pytest.fixture(scope="session")
def shared_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2_moe(tmp_path_factory.mktemp("shared_expert"), vocab_size=130)
