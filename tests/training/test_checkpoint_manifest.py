"""What a trainer writes into a manifest can be read again, and whatever was changed afterwards is found."""

import json
from pathlib import Path

import pytest

from tests.support.checkpoint_damage import as_earlier_version, flip_bit
from treepo.config.trainer import ParallelConfig
from treepo.errors import ModelError
from treepo.training.checkpoint_manifest import (
    HUGGING_FACE,
    MANIFEST,
    TRAINER,
    AdapterManifest,
    CheckpointManifest,
    OtherFormatError,
    read_manifest,
    verified_manifest,
)

LAYOUT = ParallelConfig(tensor=2, sequence=False).model_dump()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name in (TRAINER, HUGGING_FACE):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(range(40)))
    CheckpointManifest("bfloat16", True, 3, LAYOUT, {"step": 1, "seconds": 0.1}).write(tmp_path)
    return tmp_path


def test_adapters_are_in_the_manifest_of_their_checkpoint_alone(tmp_path: Path) -> None:
    adapters = AdapterManifest(4, 8.0, ("q_proj", "down_proj"), "/models/base", "af03")
    for name, value in (("whole", None), ("adapters", adapters)):
        folder = tmp_path / name
        folder.mkdir()
        CheckpointManifest("bfloat16", True, 3, LAYOUT, adapters=value).write(folder)
        assert read_manifest(folder).adapters == value
        assert (b'"adapters"' in (folder / MANIFEST).read_bytes()) == (value is not None)


def test_a_trainers_layout_comes_back(checkpoint: Path) -> None:
    """It has numbers of ranks and a switch, `sequence`."""
    manifest = verified_manifest(checkpoint)
    assert manifest.layout == LAYOUT
    assert manifest.optimizer_steps == 3
    assert manifest.files == dict.fromkeys((f"{HUGGING_FACE}/file", f"{TRAINER}/file"), 40)


def test_a_flipped_bit_of_any_byte_of_a_file_is_found(checkpoint: Path) -> None:
    path = checkpoint / TRAINER / "file"
    for position in range(40):
        flip_bit(path, position, position % 8)
        with pytest.raises(ModelError, match=r"trainer/file has another content than when"):
            verified_manifest(checkpoint)
        flip_bit(path, position, position % 8)
    verified_manifest(checkpoint)


def test_a_flipped_bit_of_any_byte_of_the_manifest_is_found(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    for position in range(path.stat().st_size):
        flip_bit(path, position, position % 8)
        with pytest.raises(ModelError, match=r"checkpoint\.json"):
            verified_manifest(checkpoint)
        flip_bit(path, position, position % 8)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_truncated_manifest_is_named(checkpoint: Path, size: int) -> None:
    (checkpoint / MANIFEST).write_bytes((checkpoint / MANIFEST).read_bytes()[:size])
    with pytest.raises(ModelError, match=r"checkpoint\.json: not readable"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("version", [1, 4])
def test_another_format_is_no_damage(checkpoint: Path, version: int) -> None:
    content = json.loads((checkpoint / MANIFEST).read_bytes())
    (checkpoint / MANIFEST).write_text(json.dumps(content | {"format": version}))
    with pytest.raises(OtherFormatError, match=f"format {version}; this version reads 2 and 3"):
        read_manifest(checkpoint)


def test_the_format_without_checksums_is_read(checkpoint: Path) -> None:
    as_earlier_version(checkpoint)
    assert verified_manifest(checkpoint).checksums == {}
    (checkpoint / TRAINER / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="trainer/file has 0 bytes, and had 40"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("name", ["/etc/hostname", "../beside", "trainer/../../beside"])
def test_no_file_outside_is_looked_at(checkpoint: Path, name: str) -> None:
    as_earlier_version(checkpoint, files={name: 3})
    with pytest.raises(ModelError, match="is not in the folder"):
        read_manifest(checkpoint)
