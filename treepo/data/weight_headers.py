"""The tensors of a model folder, from its index and its safetensors' headers; no weights are read.

A folder has one set of weights: model.safetensors, or an index and the files that it names. Without an index
SGLang loads every *.safetensors and the trainer model.safetensors; with one, transformers still prefers
model.safetensors. So another *.safetensors beside the set is an error. Mistral's consolidated*.safetensors is
none where nobody reads it, and neither are weights in other formats (*.bin, *.pt, *.gguf).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from treepo.data.model_config import check_no_pointers, read_json_object, shown
from treepo.errors import ModelError, one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_LONGEST_NAME = 255  # bytes, on Linux
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf")
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where a tensor is, and what it is. dtype: in safetensors' words, such as BF16."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors, complete or not."""
    return any(folder.glob("*.safetensors"))


def read_weight_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the folder, by name.

    Leaves out rotary buffers, which older versions of transformers saved and everyone computes anew. Raises
    ModelError unless the folder has one whole set of weights and its index agrees with it.
    """
    check_no_pointers(folder)
    for name in _ADAPTER:
        if (folder / name).exists():
            raise ModelError(
                f"{folder / name}: an adapter beside the weights; merge it into them (peft's "
                "merge_and_unload), or remove its files to use the weights alone"
            )
    index = _read_index(folder) if (folder / INDEX).is_file() else None
    files = sorted(set(index.values())) if index is not None else [WEIGHTS]
    _check_one_set(folder, files, index)
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in _read_headers(folder, file).items():
            if name in headers:
                raise ModelError(f"{folder}: {name} is both in {headers[name].file} and in {file}")
            headers[name] = header
    if index is not None:
        _check_index(folder, index, headers)
    if not headers:
        raise ModelError(f"{folder}: {', '.join(files)} has no tensor")
    return headers


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, according to the index."""
    path = folder / INDEX
    found = read_json_object(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{path}: weight_map = {shown(found)}; it must name the file of every tensor")
    for name, file in found.items():
        named = isinstance(file, str) and len(file.encode(errors="replace")) <= _LONGEST_NAME
        if not named or "/" in file or "\0" in file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{path}: weight_map has {shown(file)} for {name}; a *.safetensors of the folder is needed"
            )
    return {name: file for name, file in found.items() if not _BUFFERS.search(name)}


def _check_one_set(folder: Path, files: list[str], index: Mapping[str, str] | None) -> None:
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if index is None and WEIGHTS not in present:
        if present:
            raise ModelError(
                f"{folder}: it has {_some(present)}, but no {INDEX} that says what belongs together"
            )
        others = sorted(path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern))
        hint = f"; {_some(others)} must be saved as safetensors first" if others else ""
        raise ModelError(f"{folder}: no *.safetensors in the folder{hint}")
    for file in files:
        if (folder / file).is_file():
            continue
        if index is None:  # its name is there
            raise ModelError(
                f"{folder / file}: a folder, or a link to a file that is not there; download the model again"
            )
        names = [name for name, place in index.items() if place == file]
        raise ModelError(
            f"{folder}: {INDEX} names {file} for {_some(names)}, but the file is not there; download the "
            "model again"
        )
    others = [name for name in present if name not in files]
    # Without an index SGLang skips consolidated.safetensors, and only if there is no third file.
    if index is not None or others == ["consolidated.safetensors"]:
        others = [name for name in others if not name.startswith("consolidated")]
    if others:
        ours = f"{INDEX} and its files are" if index is not None else f"{WEIGHTS} is"
        raise ModelError(
            f"{folder}: {_some(others)}: a second set of weights, where {ours} the first; move one of the "
            "two away"
        )


def _read_headers(folder: Path, file: str) -> dict[str, TensorHeader]:
    path = folder / file
    try:
        with safe_open(path, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            return {
                name: TensorHeader(file, tuple(each.get_shape()), each.get_dtype())
                for name, each in slices.items()
                if not _BUFFERS.search(name)
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file: {one_line(error)}; download it again"
        ) from None


def _check_index(folder: Path, index: Mapping[str, str], headers: Mapping[str, TensorHeader]) -> None:
    for name, file in index.items():
        if name not in headers:
            raise ModelError(f"{folder}: {INDEX} names {file} for {name}, which is not in it")
        if headers[name].file != file:
            raise ModelError(f"{folder}: {INDEX} names {file} for {name}, which is in {headers[name].file}")
    for name, header in headers.items():
        if name not in index:
            raise ModelError(f"{folder}: {name} is in {header.file}, but not in {INDEX}")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
