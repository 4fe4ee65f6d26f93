"""`treepo convert` loses nothing, in memory that does not grow with the model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_bridge import distributed_checkpoint
from megatron_bridge.convert import convert, to_checkpoint, to_hugging_face
from megatron_bridge.hf_folder import INDEX, SafetensorsReader, write_hf_folder
from tests.megatron_bridge.test_hf_weight_map import CONFIGS
from tests.support.checkpoint_damage import as_earlier_version, flip_bit
from tests.support.tiny import write_tiny_qwen2
from treepo.cli.main import app
from treepo.errors import ModelError
from treepo.training.checkpoint_manifest import read_manifest

MODELS = [*CONFIGS, "tied"]
SHARD = 10_000  # bytes, so that every model has several files


@pytest.fixture(params=MODELS)
def model(request, tmp_path: Path) -> Path:
    """A random model of each family in several files, with a tokenizer config and a generation config."""
    folder = tmp_path / request.param
    if request.param == "tied":
        return write_tiny_qwen2(folder, tie_word_embeddings=True, vocab_size=127)
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16)
    network.save_pretrained(folder, max_shard_size=SHARD)
    assert (folder / INDEX).is_file()
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_there_and_back_is_the_same_bit_for_bit(model: Path, tmp_path: Path) -> None:
    there = to_checkpoint(model, tmp_path / "checkpoint")
    back = to_hugging_face(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=SHARD)
    before, after = weights(model), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert tensor.dtype == after[name].dtype
    assert there.parameters == back.parameters == sum(tensor.numel() for tensor in before.values())
    assert read_manifest(tmp_path / "checkpoint").has_optimizer is False
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    names = {entry.name for entry in model.iterdir() if entry.suffix == ".json"}
    assert names - {INDEX} <= {entry.name for entry in (tmp_path / "back").iterdir()}
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


class _TouchedBytes(TorchDispatchMode):
    """The peak memory of tensors that any operation reads or makes; meta tensors have none."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, result)):
            if isinstance(value, Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


def test_memory_is_bounded_by_a_file_not_by_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_qwen2(
        tmp_path / "whole", hidden_size=64, intermediate_size=128, num_hidden_layers=12, vocab_size=64
    )
    folder = tmp_path / "model"
    reader = SafetensorsReader(model)
    write_hf_folder(((name, reader.read(name)) for name in weights(model)), model, folder, 100_000)
    size = sum(tensor.nbytes for tensor in weights(model).values())
    largest = 2 * 128 * 64 * 4  # gate and up projection, one parameter
    file_bytes = 100_000
    monkeypatch.setattr(distributed_checkpoint, "FILE_BYTES", file_bytes)
    # A file, and a parameter's tensors as they are read, joined and cut.
    bound = file_bytes + 4 * largest
    assert size > 4 * bound
    with _TouchedBytes() as there:
        to_checkpoint(folder, tmp_path / "checkpoint")
    with _TouchedBytes() as back:
        to_hugging_face(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=file_bytes)
    assert largest < there.peak < bound
    assert largest < back.peak < bound


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convert")
    to_checkpoint(write_tiny_qwen2(root / "model"), root / "checkpoint")
    return root / "checkpoint"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command_says_what_it_wrote(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, tmp_path / "model")
    assert result.exit_code == 0
    assert "a Hugging Face folder of" in result.stdout
    assert "float32" in result.stdout
    assert weights(tmp_path / "model")


def test_what_cannot_be_converted_is_named(checkpoint: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(checkpoint, run_folder / "checkpoints" / "step-00007")
    for source, target, message in (
        (tmp_path / "nothing", tmp_path / "x", "nothing: no such file or folder"),
        (tmp_path, tmp_path / "x", "neither a training checkpoint"),
        (checkpoint, checkpoint, "exists: nothing is overwritten"),
        (run_folder, tmp_path / "x", "is a run folder; its newest checkpoint is .*step-00007"),
    ):
        with pytest.raises(ModelError, match=message):
            convert(source, target)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("lost", ["trainer/.metadata", "trainer/__0_0.distcp", "hugging_face/config.json"])
def test_a_damaged_checkpoint_leaves_nothing(checkpoint: Path, tmp_path: Path, lost: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / lost).unlink()
    with pytest.raises(ModelError, match="damaged"):
        convert(damaged, tmp_path / "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


def test_a_flipped_bit_is_named_and_nothing_is_converted(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "damaged")
    file = tmp_path / "damaged" / "trainer" / "__0_0.distcp"
    flip_bit(file, file.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"__0_0\.distcp has another content than when"):
        convert(tmp_path / "damaged", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_of_a_damaged_checkpoint_the_newest_whole_one_of_its_run_is_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    names = [f"step-0000{step}" for step in (1, 2, 3, 4)]
    for name in names:
        shutil.copytree(checkpoint, tmp_path / name)
    for name in names[2:]:
        (tmp_path / name / "trainer" / ".metadata").write_bytes(b"")
    said = str(run(tmp_path / names[3], tmp_path / "x").exception)
    assert said.startswith(f"{tmp_path / names[3]}/trainer/.metadata has 0 bytes, and had ")
    assert said.endswith(f"; {tmp_path / names[1]} is whole")
    assert "is whole" not in str(run(tmp_path / names[0], tmp_path / names[0]).exception)  # not its fault
    for name in names[:2]:
        shutil.rmtree(tmp_path / name)
    said = str(run(tmp_path / names[3], tmp_path / "x").exception)
    assert said.endswith("; no other checkpoint of its run is whole")


def test_weights_that_are_not_the_configs_are_named(tmp_path: Path) -> None:
    model, other = write_tiny_qwen2(tmp_path / "model"), write_tiny_qwen2(tmp_path / "other", hidden_size=32)
    shutil.copyfile(model / "model.safetensors", other / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight has shape \[128, 64\] .* \[128, 32\] by config"):
        convert(other, tmp_path / "x")
    assert not list(tmp_path.glob("*x*"))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("size", [0, 50, 1000])
@pytest.mark.parametrize("sizes", [True, False])
def test_a_truncated_checkpoint_is_one_line(tmp_path: Path, name: str, size: int, sizes: bool) -> None:
    """Also a checkpoint of an earlier version, whose manifest has no sizes."""
    checkpoint = tmp_path / "checkpoint"
    to_checkpoint(write_tiny_qwen2(tmp_path / "model", vocab_size=127), checkpoint)
    (checkpoint / "trainer" / name).write_bytes((checkpoint / "trainer" / name).read_bytes()[:size])
    if not sizes:
        as_earlier_version(checkpoint, files={})
    with pytest.raises(ModelError) as error:
        convert(checkpoint, tmp_path / "out")
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 700
    if sizes:
        assert said.startswith(f"{checkpoint / 'trainer' / name} has {size} bytes, and had ")
    else:
        assert said.startswith(f"{checkpoint / 'trainer'}: not readable as this model's: ")
    assert not (tmp_path / "out").exists()
