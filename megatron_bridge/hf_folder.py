"""Reads and writes Hugging Face folders: safetensors one tensor or one file at a time, config, tokenizer."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_bridge.atomic_folder import atomic_folder, split_into_files
from treepo.data.model_config import CONFIG, read_json_object
from treepo.data.weight_headers import INDEX, WEIGHTS, read_weight_headers
from treepo.errors import ModelError

COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}  # tokenizer, generation config, chat template
SHARD_BYTES = 4 << 30


class SafetensorsReader:
    """Reads the tensors of a Hugging Face folder, one at a time.

    Raises ModelError if the folder has not one whole set of safetensors, or lacks a tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers = read_weight_headers(folder)

    def read(self, name: str) -> Tensor:
        if name not in self._headers:
            raise ModelError(f"{self.folder}: no tensor {name}")
        with safe_open(self.folder / self._headers[name].file, framework="pt") as file:
            return file.get_tensor(name)


def write_hf_folder(
    tensors: Iterable[tuple[str, Tensor]], source: Path, folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """As `write_model`; the folder appears complete or not at all."""
    with atomic_folder(folder) as partial:
        write_model(tensors, source, partial, shard_bytes)


def write_model(
    tensors: Iterable[tuple[str, Tensor]], source: Path, folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors`, all of one dtype, with `source`'s config, tokenizer and generation config, into an
    empty folder. A file holds at most `shard_bytes`, or a single larger tensor.
    """
    dtype = _write_shards(tensors, folder, shard_bytes)
    copy_model_files(source, folder, dtype)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> str:
    """Write the safetensors files; return the tensors' dtype. Of a file not yet written only the tensor that
    came last is on its device.
    """
    shards: list[dict[str, int]] = []  # for each file, the sizes of its tensors in bytes
    dtype = ""
    for group in split_into_files(map(_on_host, tensors), lambda named: named[1].nbytes, shard_bytes):
        shard = dict(group)
        dtype = str(group[0][1].dtype).removeprefix("torch.")
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
    _name_shards(folder, shards)
    return dtype


def _on_host(named: tuple[str, Tensor]) -> tuple[str, Tensor]:
    name, tensor = named
    return name, tensor.contiguous().cpu()


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Name the weight files as transformers does, and index them if there are several."""
    count = len(shards)
    if count == 1:
        (folder / "0.safetensors").rename(folder / WEIGHTS)
        return
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        (folder / f"{number}.safetensors").rename(folder / name)
    weight_map = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    index = {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
        "weight_map": weight_map,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def copy_model_files(source: Path, folder: Path, dtype: str) -> None:
    """Copy `source`'s config, tokenizer, generation config and chat template; set the config's dtype."""
    for path in source.iterdir():
        if path.suffix in COPIED and path.name not in (CONFIG, INDEX):
            shutil.copyfile(path, folder / path.name)
    config = read_json_object(source / CONFIG)
    keys = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}  # older configs say torch_dtype
    config |= dict.fromkeys(keys, dtype)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
