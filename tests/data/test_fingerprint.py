"""A model folder's fingerprint: equal for a copy, different after any training."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from treepo.data.fingerprint import model_fingerprint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    weights = np.random.default_rng(0).integers(0, 256, size=10_000_000, dtype=np.uint8)
    (tmp_path / "model" / "model.safetensors").write_bytes(weights.tobytes())
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_a_copy_has_the_same(model: Path, tmp_path: Path) -> None:
    assert model_fingerprint(shutil.copytree(model, tmp_path / "copy")) == model_fingerprint(model)


@pytest.mark.parametrize("change", ["all", "first", "last", "longer", "renamed", "config"])
def test_a_change_shows(model: Path, change: str) -> None:
    before = model_fingerprint(model)
    file = model / "model.safetensors"
    weights = np.frombuffer(file.read_bytes(), dtype=np.uint8).copy()
    if change == "all":
        weights += 1
    elif change in ("first", "last"):
        weights[0 if change == "first" else -1] += 1
    elif change == "longer":
        weights = np.append(weights, weights[:1])
    elif change == "config":
        (model / "config.json").write_text("{ }")
    file.write_bytes(weights.tobytes())
    if change == "renamed":
        file.rename(model / "model-00001.safetensors")
    assert model_fingerprint(model) != before
