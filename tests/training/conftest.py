"""Fixtures of the tests that train with fakes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import write_model_and_problems
from tests.support.training_runs import LengthRewards, use_rewards
from treepo.data.background_writer import BackgroundWriter
from treepo.training import checkpoints, run_folder, train


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


@pytest.fixture(autouse=True)
def instant_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes no turn of the event loop, so that a run with fakes takes the same turns every time."""

    def wake(writer: BackgroundWriter) -> None:
        for file in writer._files:
            writer._flush(file)

    async def call(function: Callable[[], object]) -> object:
        return function()

    monkeypatch.setattr(BackgroundWriter, "wake", wake)
    for module in (checkpoints, run_folder, train):
        monkeypatch.setattr(module, "in_thread", call)
