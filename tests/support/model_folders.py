"""Small model folders with tokenizers, and the changes that spoil them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)

Change = Callable[[Path], object]
"""Changes a model folder."""


def config(file: str = "config.json", drop: tuple[str, ...] = (), **values: Any) -> Change:
    """Change the keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / file
        found = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in found.items() if key not in drop}))

    return change


def text(file: str, content: str) -> Change:
    """Write a file."""
    return lambda folder: (folder / file).write_text(content)


def without(*files: str) -> Change:
    return lambda folder: [(folder / file).unlink() for file in files]


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the tensors of model.safetensors in place."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def beside(file: str, name: str = "model.norm.weight") -> Change:
    """Write further safetensors with one tensor."""
    return lambda folder: save_file({name: torch.zeros(64)}, folder / file)


def sharded(change: Callable[[dict[str, str]], object] = lambda _: None) -> Change:
    """Divide the weights between two files. change: of the index, before it is written."""

    def divide(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, places = sorted(found), {}
        for file, part in (("model-1.safetensors", names[:9]), ("model-2.safetensors", names[9:])):
            save_file({name: found[name] for name in part}, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(part, file)
        change(places)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return divide


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def truncated(file: str, size: int = 1000) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
}
