"""Weights between Hugging Face folders, Megatron ranks and engines, one tensor at a time.

Rank 0 receives every shard of the first replica that holds it and joins it; the other ranks only send.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_bridge.architecture import Architecture
from megatron_bridge.collective import FAILURES, raise_everywhere, reason
from megatron_bridge.folder import Checkpoint, write_folder
from megatron_bridge.model import named_parameters
from megatron_bridge.weights import Rule, expand
from treepo.errors import ModelError
from treepo.weight_sync.wire import Manifest, TensorInfo


def load(folder: Path, chunks: Sequence[GPTModel], architecture: Architecture) -> None:
    """Fill this rank's parameters from the folder."""
    checkpoint = Checkpoint(folder)
    rules = {rule.parameter: rule for rule in expand(architecture.family.rules, architecture.dimensions)}
    if architecture.tied:
        embedding = rules["embedding.word_embeddings.weight"]
        rules["output_layer.weight"] = embedding  # the last pipeline stage's copy
    for name, parameter in named_parameters(chunks).items():
        rule = rules[name]
        ranks, rank = (1, 0) if _is_expert(parameter) else _tensor_ranks()
        tensors = [checkpoint.read(tensor) for tensor in rule.tensors]
        shard = rule.surgery.split(tensors, ranks, architecture.dimensions)[rank]
        if shard.shape != parameter.shape:
            raise ModelError(
                f"{folder}: {' + '.join(rule.tensors)} give {tuple(shard.shape)} for {name}, "
                f"which has {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(shard)


def _tensor_ranks() -> tuple[int, int]:
    """How many tensor-parallel ranks there are, and which of them this is."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _is_expert(parameter: Parameter) -> bool:
    """Experts are whole on their rank, and reduced among the ranks that hold the same ones."""
    return not getattr(parameter, "allreduce", True)  # Megatron-Core's mark


@dataclass(frozen=True, slots=True)
class _Owned:
    """What one rank holds that others need not send: its place in the tensor-parallel group, its shapes."""

    rank: int
    tensor_rank: int
    shapes: dict[str, torch.Size]


def _first_to_hold(parameter: Parameter) -> bool:
    """Whether this rank is in the first replica of those parameters."""
    if _is_expert(parameter):
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank() == 0


class Exporter:
    """The model's tensors under their Hugging Face names, on rank 0. Every method is collective."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._parameters = {
            name: parameter
            for name, parameter in named_parameters(chunks).items()
            if _first_to_hold(parameter)
        }
        self._architecture, self._dtype, self._device = architecture, dtype, device
        self._rank = torch.distributed.get_rank()
        self._rules = expand(architecture.family.rules, architecture.dimensions)
        if architecture.tied:
            self._rules = [rule for rule in self._rules if rule.parameter != "output_layer.weight"]
        mine = _Owned(
            self._rank,
            _tensor_ranks()[1],
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
                joined = rule.surgery.join(shards, self._architecture.dimensions)
                del shards  # before the receiver takes its time
                yield from zip(rule.tensors, joined, strict=True)
                del joined  # before the next is gathered

    def _gather(self, rule: Rule) -> list[Tensor]:
        """The shards on rank 0 in tensor-parallel order, or what they are together where they are stacked. On
        the other ranks an empty list.
        """
        owners = self._owners_of(rule)
        if self._rank != 0:
            if any(owned.rank == self._rank for owned in owners):
                torch.distributed.send(self._parameters[rule.parameter].detach(), dst=0)
            return []
        if rule.surgery.stacked and len(owners) > 1:
            rows, *rest = owners[0].shapes[rule.parameter]
            stack = torch.empty((len(owners), rows, *rest), dtype=self._dtype, device=self._device)
            for shard, owned in zip(stack, owners, strict=True):
                self._fetch(rule, owned, shard)
            return [stack.flatten(0, 1)]
        return [self._fetch(rule, owned) for owned in owners]

    def _fetch(self, rule: Rule, owned: _Owned, shard: Tensor | None = None) -> Tensor:
        """One rank's shard, into `shard` where given."""
        if owned.rank == 0:
            mine = self._parameters[rule.parameter].detach()
            return mine if shard is None else shard.copy_(mine)
        if shard is None:
            shard = torch.empty(owned.shapes[rule.parameter], dtype=self._dtype, device=self._device)
        torch.distributed.recv(shard, src=owned.rank)
        return shard

    def _owners_of(self, rule: Rule) -> list[_Owned]:
        """The ranks whose shards are joined, in tensor-parallel order."""
        owners = [owned for owned in self._owners if rule.parameter in owned.shapes]
        return owners[:1] if rule.surgery.replicated else owners

    def write(self, source: Path, folder: Path) -> None:
        """A Hugging Face folder with these weights and `source`'s other files. Every rank raises ModelError
        where `folder` exists, and CheckpointError where it cannot be written.
        """
        exists = [folder.exists()]
        torch.distributed.broadcast_object_list(exists, src=0)
        if exists[0]:
            raise ModelError(f"{folder} exists: nothing is overwritten")
        tensors = self.tensors()
        failure = ""
        if self._rank == 0:
            try:
                write_folder(tensors, source, folder)
            except FAILURES as error:
                failure = f"{folder}: {reason(error)}"
        for _ in tensors:  # on rank 0 what is left: the others send it all the same
            pass
        raise_everywhere(failure)
