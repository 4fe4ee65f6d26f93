"""Hugging Face folders: complete, in files of bounded size, and all or nothing."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bridge.hf_folder import INDEX, SafetensorsReader, write_hf_folder
from treepo.errors import ModelError


@pytest.fixture
def tensors(tiny_model: Path) -> dict[str, Tensor]:
    with safe_open(tiny_model / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 1 << 30])
def test_a_written_folder_loads_in_transformers(
    tensors, tiny_model: Path, tmp_path: Path, shard_bytes: int
) -> None:
    source, folder = tiny_model, tmp_path / "out"
    write_hf_folder(iter(tensors.items()), source, folder, shard_bytes)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor)
        assert torch.equal(SafetensorsReader(folder).read(name), tensor)
    assert (folder / "generation_config.json").is_file()
    assert (folder / INDEX).is_file() == (shard_bytes < 1 << 30)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_the_config_says_the_written_dtype(tensors, tiny_model: Path, tmp_path: Path) -> None:
    halves = ((name, tensor.bfloat16()) for name, tensor in tensors.items())
    write_hf_folder(halves, tiny_model, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert next(model.parameters()).dtype == torch.bfloat16


def test_an_interrupted_export_leaves_no_folder_and_does_not_disturb_the_next(
    tensors, tiny_model: Path, tmp_path: Path
) -> None:
    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors.items())[:3]
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(interrupted(), tiny_model, folder, shard_bytes=1)
    assert not folder.exists()
    write_hf_folder(iter(tensors.items()), tiny_model, folder)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]


def test_a_file_is_collected_on_the_host(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on a device are let go one by one, although all of them are in one file."""
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)  # as if it were another device's memory
    yielded: list[weakref.ref[Tensor]] = []

    def of_device() -> Iterator[tuple[str, Tensor]]:
        for number in range(9):
            assert all(earlier() is None for earlier in yielded)
            tensor = torch.full((4,), float(number))
            yielded.append(weakref.ref(tensor))
            yield f"tensor.{number}", tensor
            del tensor

    write_hf_folder(of_device(), tiny_model, tmp_path / "out")
    assert len(yielded) == 9
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert all(file.get_tensor(f"tensor.{number}").eq(number).all() for number in range(9))


def test_missing_weights_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        SafetensorsReader(tmp_path)
    with pytest.raises(ModelError, match=r"no tensor model\.nothing"):
        SafetensorsReader(tiny_model).read("model.nothing")
