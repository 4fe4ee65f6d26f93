"""Reads, writes and merges adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_bridge.adapter_names import adapter_rules
from megatron_bridge.architecture import Architecture, check_adapters, read_architecture, tensor_shapes
from megatron_bridge.hf_folder import SafetensorsReader
from treepo.config.trainer import LoraConfig
from treepo.data.model_config import CONFIG, check_no_pointers, read_json_object, shown
from treepo.data.peft_names import weight_name
from treepo.errors import ConfigError, ModelError, one_line, shortened

ADAPTER = "adapter"  # the folder of an adapter in that of its merged model
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"}
_WITHOUT_EFFECT = {
    *("task_type", "inference_mode", "lora_dropout", "peft_version", "revision", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "layers_pattern", "runtime_config"),
}
"""PEFT's keys that do not change what a trained adapter computes."""
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is."""
_OFF = (None, False, [], {}, "none")
"""Values of every other key, which would change what an adapter computes."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter in PEFT's format. base: the model folder that it was trained on, of this architecture."""

    folder: Path
    base: Path
    lora: LoraConfig
    architecture: Architecture

    def tensors(self) -> dict[str, Tensor]:
        """Every A and B by PEFT's name. Raises ModelError unless they are those of the configuration."""
        path = self.folder / ADAPTER_WEIGHTS
        expected = adapter_shapes(self.architecture, self.lora)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: not readable: {one_line(error)}") from None
        for name in sorted(expected.keys() ^ tensors.keys()):
            what = "no tensor" if name in expected else "a tensor that the base model has no place for:"
            raise ModelError(f"{path}: {what} {shortened(name)}")
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ModelError(f"{path}: {name} is {tuple(tensors[name].shape)}, not {shape}")
        return tensors


def is_adapter(folder: Path) -> bool:
    """Whether the folder is an adapter in PEFT's format, and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file()


def adapter_shapes(architecture: Architecture, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of an adapter's tensors in PEFT's file."""
    weights = tensor_shapes(architecture)
    shapes = {}
    for rule in adapter_rules(architecture, lora.targets):
        (name,) = rule.tensors
        rows, columns = weights[weight_name(name)]
        shapes[name] = (lora.rank, columns) if ".lora_A." in name else (rows, lora.rank)
    return shapes


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], lora: LoraConfig, base: Path) -> None:
    """Write an adapter of the model folder `base` into an empty folder. tensors: by PEFT's names."""
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def read_adapter(folder: Path) -> AdapterFolder:
    """Read an adapter's configuration. Raises ModelError if it is none that the trainer could have, or if
    its base is not on this machine.
    """
    check_no_pointers(folder)
    path = folder / ADAPTER_CONFIG
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type = {shown(config.get('peft_type'))}; only LORA is supported")
    for key, value in config.items():
        if key in _READ | _WITHOUT_EFFECT:
            continue
        if value not in (_BEGINNINGS if key == "init_lora_weights" else _OFF):
            raise ModelError(f"{path}: {key} = {shown(value)} is not supported: only plain LoRA is")
    targets = config.get("target_modules")
    try:
        lora = LoraConfig(rank=config.get("r"), alpha=config.get("lora_alpha"), targets=targets)  # type: ignore[arg-type]  # checked there
    except ValidationError as error:
        fault = error.errors()[0]
        key = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"}[str(fault["loc"][0])]
        raise ModelError(f"{path}: {key}: {one_line(fault['msg'])}") from None
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not os.path.isfile(os.path.join(name, CONFIG)):  # false if it is too long
        raise ModelError(
            f"{path}: base_model_name_or_path = {shown(name)} is no model folder on this machine; write the "
            "folder of the model that the adapter was trained on there"
        )
    base = Path(name)
    architecture = read_architecture(base)
    try:
        check_adapters(base, architecture, lora)
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from None
    return AdapterFolder(folder, base, lora, architecture)


def merged_tensors(
    base: Path,
    architecture: Architecture,
    lora: LoraConfig,
    adapters: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's tensors with an adapter added, in float32, and rounded to `dtype` (None: their own).

    adapters: every A and B by PEFT's name.
    """
    weights = SafetensorsReader(base)
    rules = adapter_rules(architecture, lora.targets)
    names = {(weight_name(rule.tensors[0]), ".lora_A." in rule.tensors[0]): rule.tensors[0] for rule in rules}
    for rule in architecture.weight_rules():
        for name in rule.tensors:
            weight = weights.read(name)
            weight = weight if dtype is None else weight.to(dtype)
            if (name, True) in names:
                a, b = (adapters[names[name, first]].float() for first in (True, False))
                weight = weight.float().add(b @ a, alpha=lora.alpha / lora.rank).to(weight.dtype)
            yield name, weight
