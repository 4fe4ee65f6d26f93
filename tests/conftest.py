"""Fixtures that many tests share."""

import asyncio
import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

# The tests' tensors are small, and threads that wait for each other on a busy machine cost minutes. torch
# reads the variable when it is imported. This file does not import it: the process of pytest-xdist that only
# hands out tests loads the file too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, however slow the machine is.
settings.register_profile("treepo", deadline=None, derandomize=True)
settings.load_profile("treepo")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from the modules that the tests import: millions of objects, which stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 folder (no tokenizer)."""
    from tests.support.tiny import write_tiny_qwen2  # here: its imports take seconds

    return write_tiny_qwen2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def real_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator["RealEngine"]:
    """A real SGLang engine, started once (slow tests only): see tests/support/real_engine.py."""
    import tests.support.real_engine as harness  # here: its imports take seconds that fast tests do not need

    with asyncio.Runner() as runner:
        real = harness.start(harness.write_model(tmp_path_factory.mktemp("engine")), runner.get_loop())
        yield real
        real.engine.close()
