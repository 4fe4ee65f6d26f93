"""NVIDIA's megatron-bridge as an oracle of the weight maps: it fills a model of ours with its own mapping.

Its packages are `megatron.bridge`, beside Megatron-Core. It imports Transformer Engine and other libraries
of training scripts, which no mapping needs: they are stubs here, and so the oracle has a process of its own.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from torch import Tensor

from treepo.config.learning import LearningConfig
from treepo.config.trainer import ParallelConfig, TrainerConfig

FOLDER = Path(sys.prefix) / "oracle"  # of `make oracle`

BRIDGES = {  # by `model_type`: the module within `megatron.bridge.models`, and its class
    "qwen2": ("qwen.qwen2_bridge", "Qwen2Bridge"),
    "qwen3": ("qwen.qwen3_bridge", "Qwen3Bridge"),
    "qwen3_moe": ("qwen.qwen3_moe_bridge", "Qwen3MoEBridge"),
    "llama": ("llama.llama_bridge", "LlamaBridge"),
    "mistral": ("mistral.mistral_bridge", "MistralBridge"),
}
STUBS = ("transformer_engine", "omegaconf")


class _Stubs(MetaPathFinder, Loader):
    """Imports modules of STUBS as objects that have every attribute and do nothing."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in STUBS else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __path__=[], __version__="2.0")

    def exec_module(self, module: ModuleType) -> None:
        del module


def load_registry(model_type: str) -> Any:
    """The oracle's mappings of a family.

    Only that family is imported: the packages' own `__init__` imports all, and their vision libraries.
    """
    sys.meta_path.insert(0, _Stubs())
    for name in ("megatron.bridge", "megatron.bridge.models"):
        package = ModuleType(name)
        package.__path__ = [str(FOLDER / name.replace(".", "/"))]
        sys.modules[name] = package
    module, kind = BRIDGES[model_type]
    bridge: Callable[[], Any] = getattr(import_module(f"megatron.bridge.models.{module}"), kind)
    return bridge().mapping_registry()


def compare(model: Path, layout: ParallelConfig, rank: int, store: Any, _: Path) -> dict[str, str]:
    """Load `model` into a trainer of ours, and compare each parameter with what the oracle would load there.

    Returns, of all ranks, what differs by the parameter's name; "" where nothing does.
    """
    from megatron_bridge.architecture import read_architecture
    from megatron_bridge.model import named_parameters
    from megatron_bridge.trainer import MegatronTrainer

    trainer = MegatronTrainer(
        model, "float32", TrainerConfig(parallel=layout), LearningConfig(), rank, layout.ranks, store
    )
    chunks: list[Any] = [replica.module for replica in trainer._model]
    registry = load_registry(read_architecture(model).model_type)
    tensors = load_file(model / "model.safetensors")
    owners = {
        id(parameter): module
        for chunk in chunks
        for module in chunk.modules()
        for parameter in module.parameters(recurse=False)
    }
    found = {
        name: _difference(registry, name, owners[id(parameter)], parameter, tensors)
        for name, parameter in named_parameters(chunks).items()
    }
    gathered: list[dict[str, str]] = [{}] * layout.ranks
    torch.distributed.all_gather_object(gathered, found)
    trainer.close()
    return {name: "; ".join(filter(None, (each[name] for each in gathered))) for name in found}


def _difference(registry: Any, name: str, owner: Any, parameter: Tensor, tensors: dict[str, Tensor]) -> str:
    mapping = registry.megatron_to_hf_lookup(name)
    if mapping is None:
        return "it has no mapping"
    names = mapping.hf_param
    if isinstance(names, str):
        weights: Any = tensors[names]
    else:
        weights = {part: tensors[each] for part, each in names.items()}
    theirs = mapping.hf_to_megatron(weights, owner)
    if theirs.shape != parameter.shape:
        return f"its shape is {tuple(theirs.shape)}, ours {tuple(parameter.shape)}"
    return "" if torch.equal(theirs, parameter) else f"its values differ, from {names}"
