"""Reads the JSON files of a model folder, and checks the values that every command relies on.

A folder's own code (`auto_map` in config.json) is never run: transformers' or SGLang's class of the
`model_type` is used, and a type that neither knows is an error.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo.errors import ModelError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
MOST_LAYERS = 1 << 10  # the largest open models have about 130; more would fill the memory with names
_MOST_BYTES = 64 << 20  # of a JSON file; the largest index has about 10
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024  # a pointer is smaller
_READ = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".safetensors"}  # files that some loader reads
_QUANTISED = ("quantization_config", "compression_config")
_QUANTISED_FILE = "hf_quant_config.json"  # ModelOpt's; SGLang reads it


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ModelError, also for numbers that are not finite."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ModelError(f"{path}: more than {_MOST_BYTES >> 20} MiB, so no description of a model")
        content = json.loads(text.decode(), object_pairs_hook=_finite)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise ModelError(f"{path}: it cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content


def _finite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python reads NaN and Infinity, which JSON does not have."""
    for key, value in pairs:
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{key} = {number}; a finite number is needed")
    return dict(pairs)


def check_no_pointers(folder: Path) -> None:
    """Raise ModelError if Git LFS has left a pointer in the place of a file, or if there is no folder."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    for path in sorted(folder.iterdir()):
        if path.suffix not in _READ or not path.is_file():
            continue
        with path.open("rb") as file:
            if path.stat().st_size < _POINTER_BYTES and file.read(len(_POINTER)) == _POINTER:
                raise ModelError(
                    f"{path}: a Git LFS pointer in the place of the file; `git lfs pull` in its folder "
                    "fetches it"
                )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read `folder`/config.json and check what every model has. Raises ModelError. Imports nothing heavy."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; a Hugging Face model folder is needed")
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder}: it has no {CONFIG}, so it is no Hugging Face model folder")
    check_no_pointers(folder)
    config = read_json_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(
            f"{path}: " + wrong_value("model_type", model_type, "the name of a model family")
            if "model_type" in config
            else f"{path}: model_type is missing; it names the model's family"
        )
    text = text_config(config)
    for part in (config, text):
        for key in _QUANTISED:
            if (found := part.get(key)) is not None:
                raise ModelError(f"{path}: {_quantised(f'{key} = {shown(found)}')}")
    if (folder / _QUANTISED_FILE).is_file():
        raise ModelError(f"{folder / _QUANTISED_FILE}: {_quantised('it describes quantised weights')}")
    layers = text.get("num_hidden_layers")
    if isinstance(layers, (int, float)) and layers > MOST_LAYERS:
        raise ModelError(f"{path}: " + wrong_value("num_hidden_layers", layers, f"at most {MOST_LAYERS}"))
    token_ids(config.get("eos_token_id"), path)
    token_ids(text.get("eos_token_id"), path)
    _check_auto_map(config.get("auto_map"), path)
    return config


def _check_auto_map(found: object, path: Path) -> None:
    """Raise ModelError for values over which transformers stumbles before it decides to run no code."""
    if found is not None and not (
        isinstance(found, dict) and all(isinstance(name, str | list) for name in found.values())
    ):
        raise ModelError(f"{path}: " + wrong_value("auto_map", found, "an object of names; or remove it"))


def _quantised(found: str) -> str:
    return (
        f"{found}; quantised weights can be neither trained nor sampled from here: use the folder of the "
        "unquantised model, or evaluate this one on a server of your own (model.url of `treepo eval`)"
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a multimodal model's config that describes its language model; else the config itself."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def load_hf_config(folder: Path) -> "PreTrainedConfig":
    """Read `folder`/config.json as transformers does, after `read_model_config`. Raises ModelError."""
    read_model_config(folder)
    from transformers import AutoConfig  # here: it takes seconds, and the command line stays fast

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each family's class checks in its own way
        raise ModelError(f"{folder / CONFIG}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The cause of a validation error names the field and its value."""
    cause = error.__cause__ if isinstance(error.__cause__, (TypeError, ValueError)) else error
    return f"transformers refuses it: {one_line(cause) or type(error).__name__}"[:300]


def token_ids(value: object, path: Path) -> list[int]:
    """The ids that `eos_token_id` of the file `path` names: none, one, or several. Raises ModelError."""
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        if not isinstance(each, int) or isinstance(each, bool) or each < 0:
            raise ModelError(
                f"{path}: " + wrong_value("eos_token_id", value, "a token's number, or a list of them")
            )
    return ids


def wrong_value(key: str, found: object, needed: str) -> str:
    """The common words of an error about one value of a JSON file."""
    return f"{key} = {shown(found)}; it must be {needed}"


def shown(value: object) -> str:
    """A JSON value in one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
