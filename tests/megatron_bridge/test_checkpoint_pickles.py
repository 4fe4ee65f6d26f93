"""A checkpoint that someone else made: its pickles run no code, and claim no memory."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_bridge.checkpoint_pickles import METADATA, read_index, without_code
from megatron_bridge.distributed_checkpoint import (
    READ_FAILURES,
    DistributedCheckpointReader,
    write_distributed_checkpoint,
)
from treepo.errors import ModelError

TENSORS = {"a": (torch.Size([2, 3]), torch.float32), "b": (torch.Size([4]), torch.bfloat16)}


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "trainer"
    path.mkdir()
    write_distributed_checkpoint(
        path, TENSORS, lambda key: torch.ones(*TENSORS[key][:1], dtype=TENSORS[key][1])
    )
    return path


def refused(folder: Path, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        DistributedCheckpointReader(folder).read("a")
    assert "\n" not in str(caught.value)


def test_an_index_of_tensors_is_read(folder: Path) -> None:
    assert set(TENSORS) <= set(read_index(folder).state_dict_metadata)
    assert torch.equal(DistributedCheckpointReader(folder).read("a"), torch.ones(2, 3))


def test_an_index_that_would_run_code_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps([Metadata({}), Harmful(tmp_path / "harm")]))
    refused(folder, r"\.metadata names pathlib\.Path\.touch, which none needs|pathlib\..*none needs|getattr")
    assert not (tmp_path / "harm").exists()
    for content in (b"cposix\nsystem\n(S'exit 7'\ntR.", b"ctorch\nload\n.", b"cbuiltins\neval\n."):
        (folder / METADATA).write_bytes(content)
        refused(folder, "which none needs")


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x05\x96" + b"\xff\xff\xff\xff\x7f\0\0\0", b"N.", b"(" * 5000 + b"t" * 5000 + b"."]
)
def test_a_damaged_index_is_one_line(folder: Path, content: bytes) -> None:
    (folder / METADATA).write_bytes(content)
    refused(folder, "not readable as this model's")


def changed(folder: Path, change: Any) -> None:
    index = read_index(folder)
    change(index)
    (folder / METADATA).write_bytes(pickle.dumps(index))


def test_an_index_cannot_lead_out_of_the_folder(folder: Path) -> None:
    def escape(index: Metadata) -> None:
        for place in index.storage_data.values():
            place.relative_path = "../" + place.relative_path

    changed(folder, escape)
    refused(folder, "which is no file of the folder")


def test_a_tensor_cannot_be_larger_than_its_files(folder: Path) -> None:
    changed(
        folder, lambda index: setattr(index.state_dict_metadata["a"], "size", torch.Size([1 << 20, 1 << 20]))
    )
    refused(folder, "a has 4398046511104 bytes, and all files")


def test_an_index_without_places_is_refused(folder: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Metadata({}, storage_meta=StorageMeta())))
    refused(folder, "is no index of a checkpoint")


def test_objects_are_loaded_as_weights_are(folder: Path, tmp_path: Path) -> None:
    plain, harmful = io.BytesIO(), io.BytesIO()
    torch.save([{"torch": torch.ones(2), "names": {"a": 1}}], plain)
    torch.save([Harmful(tmp_path / "harm")], harmful)
    before = dict(os.environ)
    with without_code(folder):
        plain.seek(0)
        assert torch.load(plain, weights_only=False)[0]["names"] == {"a": 1}
        harmful.seek(0)
        with pytest.raises(READ_FAILURES):
            torch.load(harmful, weights_only=False)
    assert not (tmp_path / "harm").exists()
    assert dict(os.environ) == before
