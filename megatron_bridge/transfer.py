"""Weights between Hugging Face folders, Megatron ranks and engines, one tensor at a time.

Rank 0 receives every shard of the first data-parallel replica and joins it; the other ranks only send.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_bridge.architecture import Architecture
from megatron_bridge.folder import Checkpoint, write_folder
from megatron_bridge.model import named_parameters
from megatron_bridge.weights import Rule, expand
from treepo.errors import ModelError
from treepo.transport.wire import Manifest, TensorInfo


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

    def manifest(self) -> Manifest:
        """What `tensors` will yield, from the shapes alone; the same on every rank."""
        return tuple(
            TensorInfo.of(name, tensor)
            for rule in self._rules
            for name, tensor in zip(
                rule.tensors,
                rule.surgery.join(
                    [
                        torch.empty(owned.shapes[rule.parameter], dtype=self._dtype, device="meta")
                        for owned in self._owners_of(rule)
                    ],
                    self._architecture.dimensions,
                ),
                strict=True,
            )
        )

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
        owners = self._owners_of(rule)
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

    def _owners_of(self, rule: Rule) -> list[_Owned]:
        """The ranks whose shards are joined, in tensor-parallel order."""
        owners = [owned for owned in self._owners if rule.parameter in owned.shapes]
        return owners[:1] if rule.surgery.replicated else owners

    def write(self, source: Path, folder: Path) -> None:
        """A Hugging Face folder with these weights and `source`'s other files. Raises ModelError, on every
        rank, where `folder` exists.
        """
        exists = [folder.exists()]
        torch.distributed.broadcast_object_list(exists, src=0)
        if exists[0]:
            raise ModelError(f"{folder} exists: nothing is overwritten")
        if self._rank == 0:
            write_folder(self.tensors(), source, folder)
        else:
            for _ in self.tensors():
                pass
        torch.distributed.barrier()
