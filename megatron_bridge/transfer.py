"""Weights between Hugging Face folders, Megatron ranks and engines, one tensor at a time.

Rank 0 receives every shard of the first data-parallel replica and joins it; the other ranks only send.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_bridge.model import Architecture, named_parameters
from megatron_bridge.weights import Rule, expand
from treepo.errors import ModelError
from treepo.protocols import Bucket

INDEX = "model.safetensors.index.json"
COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}  # tokenizer, generation config, chat template
SHARD_BYTES = 4 << 30


class Checkpoint:
    """The safetensors of a Hugging Face folder, read lazily. Raises ModelError for what is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            self._file_of = orjson.loads((folder / INDEX).read_bytes())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ModelError(f"{folder}: neither model.safetensors nor {INDEX}")

    def read(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: no tensor {name}")
        with safe_open(self.folder / self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)


def load(folder: Path, model: GPTModel, architecture: Architecture) -> None:
    """Fill this rank's parameters from the folder."""
    checkpoint = Checkpoint(folder)
    rules = {
        rule.parameter: rule for rule in expand(architecture.family.rules, architecture.dimensions.layers)
    }
    if architecture.tied:
        embedding = rules["embedding.word_embeddings.weight"]
        rules["output_layer.weight"] = embedding  # the last pipeline stage's copy
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in named_parameters(model).items():
        rule = rules[name]
        tensors = [checkpoint.read(tensor) for tensor in rule.tensors]
        shard = rule.surgery.split(tensors, ranks, architecture.dimensions)[rank]
        if shard.shape != parameter.shape:
            raise ModelError(
                f"{folder}: {' + '.join(rule.tensors)} give {tuple(shard.shape)} for {name}, "
                f"which has {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(shard)


@dataclass(frozen=True, slots=True)
class _Owned:
    """What one rank of the first replica holds: its place in the tensor-parallel group, its shapes."""

    rank: int
    tensor_rank: int
    shapes: dict[str, torch.Size]


class Exporter:
    """The model's tensors under their Hugging Face names, on rank 0. Every method is collective."""

    def __init__(self, model: GPTModel, architecture: Architecture, dtype: torch.dtype, device: torch.device):
        self._parameters = named_parameters(model) if parallel_state.get_data_parallel_rank() == 0 else {}
        self._architecture, self._dtype, self._device = architecture, dtype, device
        self._rank = torch.distributed.get_rank()
        self._rules = expand(architecture.family.rules, architecture.dimensions.layers)
        if architecture.tied:
            self._rules = [rule for rule in self._rules if rule.parameter != "output_layer.weight"]
        mine = _Owned(
            self._rank,
            parallel_state.get_tensor_model_parallel_rank(),
            {name: parameter.shape for name, parameter in self._parameters.items()},
        )
        everyone: list[_Owned] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        self._owners = sorted(everyone, key=lambda owned: owned.tensor_rank)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, in the order of the family's table; nothing on the other ranks."""
        for rule in self._rules:
            shards = self._gather(rule)
            if shards:
                yield from zip(
                    rule.tensors, rule.surgery.join(shards, self._architecture.dimensions), strict=True
                )

    def _gather(self, rule: Rule) -> list[Tensor]:
        """The rule's shards on rank 0 in tensor-parallel order; on the other ranks an empty list."""
        owners = [owned for owned in self._owners if rule.parameter in owned.shapes]
        if rule.surgery.replicated:
            owners = owners[:1]
        if self._rank != 0:
            if any(owned.rank == self._rank for owned in owners):
                torch.distributed.send(self._parameters[rule.parameter].detach(), dst=0)
            return []
        shards = []
        for owned in owners:
            if owned.rank == 0:
                shards.append(self._parameters[rule.parameter].detach())
                continue
            shard = torch.empty(owned.shapes[rule.parameter], dtype=self._dtype, device=self._device)
            torch.distributed.recv(shard, src=owned.rank)
            shards.append(shard)
        return shards

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """`tensors` in buckets of at most `bucket_bytes`, or of one tensor that is larger."""
        for group in _grouped(self.tensors(), bucket_bytes):
            yield Bucket(
                names=tuple(name for name, _ in group),
                dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in group),
                shapes=tuple(tuple(tensor.shape) for _, tensor in group),
                data=torch.cat([_bytes(tensor) for _, tensor in group]).cpu().numpy(),
            )

    def write(self, source: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """A Hugging Face folder with these weights, `source`'s tokenizer and config; appears complete or not
        at all. Raises ModelError where `folder` exists.
        """
        if self._rank == 0 and folder.exists():
            raise ModelError(f"{folder} exists")
        partial = folder.with_name(f".{folder.name}.partial")
        file_of: dict[str, str] = {}
        total = 0
        for number, group in enumerate(_grouped(self.tensors(), shard_bytes)):
            partial.mkdir(parents=True, exist_ok=True)
            shard = {name: tensor.contiguous().cpu() for name, tensor in group}
            save_file(shard, partial / _shard_name(number), metadata={"format": "pt"})
            file_of |= dict.fromkeys(shard, _shard_name(number))
            total += sum(tensor.nbytes for tensor in shard.values())
        if self._rank == 0:
            _finish(source, partial, file_of, total, self._dtype)
            partial.rename(folder)
        torch.distributed.barrier()


def _grouped(tensors: Iterable[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors of at most `size` bytes together."""
    group: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in tensors:
        if group and used + tensor.nbytes > size:
            yield group
            group, used = [], 0
        group.append((name, tensor))
        used += tensor.nbytes
    if group:
        yield group


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _finish(source: Path, folder: Path, file_of: dict[str, str], total: int, dtype: torch.dtype) -> None:
    """Name the weight files as transformers does, index them if there are several, add the other files."""
    shards = sorted(set(file_of.values()))
    count = len(shards)
    names = {
        shard: "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        for i, shard in enumerate(shards, start=1)
    }
    for shard, name in names.items():
        (folder / shard).rename(folder / name)
    if count > 1:
        weight_map = {tensor: names[shard] for tensor, shard in file_of.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2))
    for path in source.iterdir():
        if path.suffix in COPIED and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, folder / path.name)
    config = orjson.loads((source / "config.json").read_bytes())
    name = str(dtype).removeprefix("torch.")
    config |= dict.fromkeys({"dtype", "torch_dtype"} & config.keys() or {"dtype"}, name)
    (folder / "config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
