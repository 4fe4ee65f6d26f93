"""Fixtures that many tests share."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from tests.support.tiny import write_tiny_qwen2

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

# The tests' tensors are small, and threads that wait for each other on a busy machine cost minutes. The
# variable is for processes that tests start; torch has already read it in this one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The same examples in every run, however slow the machine is.
settings.register_profile("treepo", deadline=None, derandomize=True)
settings.load_profile("treepo")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 folder (no tokenizer)."""
    return write_tiny_qwen2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def real_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator["RealEngine"]:
    """A real SGLang engine, started once (slow tests only): see tests/support/real_engine.py."""
    import tests.support.real_engine as harness  # here: its imports take seconds that fast tests do not need

    with asyncio.Runner() as runner:
        real = harness.start(harness.write_model(tmp_path_factory.mktemp("engine")), runner.get_loop())
        yield real
        real.engine.close()
