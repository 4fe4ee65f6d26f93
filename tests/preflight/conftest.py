"""Model folders in a working directory of their own, beside problems.jsonl."""

import shutil
from pathlib import Path

import pytest
from transformers import MistralConfig, MistralForCausalLM, Olmo2Config, Olmo2ForCausalLM

from tests.support.command import write_model_and_problems
from tests.support.model_folders import SMALL, without


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_model_and_problems(root, root / "problems.jsonl", 2)
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's folder, in the working directory and beside problems.jsonl."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("model")


@pytest.fixture
def olmo2(folder: Path) -> Path:
    """A family that the trainer does not know."""
    without("model.safetensors")(folder)
    Olmo2ForCausalLM(Olmo2Config(**SMALL, max_position_embeddings=1024)).save_pretrained(folder)
    return folder


@pytest.fixture
def mistral(folder: Path) -> Path:
    without("model.safetensors")(folder)
    model = MistralForCausalLM(MistralConfig(**SMALL, max_position_embeddings=1024, sliding_window=None))
    model.save_pretrained(folder)
    return folder
