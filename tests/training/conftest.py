"""Fixtures of the tests that train with fakes."""

from pathlib import Path

import pytest

from tests.support.command import write_model_and_problems
from tests.support.training_runs import LengthRewards, use_rewards


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a configuration of a model, and 9 problems."""
    folder = tmp_path_factory.mktemp("loop")
    write_model_and_problems(folder, folder / "problems.jsonl", 9)
    return folder


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grade by the length of the response, without processes."""
    use_rewards(monkeypatch, LengthRewards())
