"""A checkpoint's pickles run no code, and its paths stay in its folder."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bridge.checkpoint_pickles import METADATA, read_index
from megatron_bridge.convert import convert, to_checkpoint
from tests.support.tiny import write_tiny_qwen2
from treepo.errors import ModelError


class Runs:
    """Unpickling it touches a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return Path.touch, (self._mark,)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    to_checkpoint(write_tiny_qwen2(folder / "model"), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy, without sizes in its manifest, which its author would have adapted."""
    import json
    import shutil

    copy = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    manifest = json.loads((copy / "checkpoint.json").read_bytes())
    (copy / "checkpoint.json").write_text(json.dumps(manifest | {"files": {}}))
    return copy


def change(checkpoint: Path, edit: Callable[[Any], None]) -> None:
    path = checkpoint / "trainer" / METADATA
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_a_whole_one_is_read(checkpoint: Path) -> None:
    read_index(checkpoint / "trainer")


def refused(checkpoint: Path, tmp_path: Path, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_code_in_the_metadata_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    def edit(metadata: Any) -> None:
        metadata.planner_data = Runs(tmp_path / "ran")

    change(checkpoint, edit)
    refused(checkpoint, tmp_path, "which none needs")


@pytest.mark.parametrize(
    "names", [b"cos\nsystem\n", b"ctorch\nload\n", b"\x80\x04\x8c\x05torch\x8c\x07os.path\x93"]
)
def test_names_in_the_metadata(checkpoint: Path, tmp_path: Path, names: bytes) -> None:
    (checkpoint / "trainer" / METADATA).write_bytes(names + b"(S'touch ran'\ntR.")
    refused(checkpoint, tmp_path, "which none needs")


@pytest.mark.parametrize("file", ["../outside.distcp", "/etc/passwd", "..", ""])
def test_a_file_outside_is_not_read(checkpoint: Path, tmp_path: Path, file: str) -> None:
    def edit(metadata: Any) -> None:
        index = next(iter(metadata.storage_data))
        metadata.storage_data[index] = replace(metadata.storage_data[index], relative_path=file)

    change(checkpoint, edit)
    refused(checkpoint, tmp_path, "which is no file of the folder")
