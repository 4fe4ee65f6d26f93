"""Moves weights from Hugging Face folders to the ranks, and from the ranks to engines or folders.

One tensor moves at a time. Rank 0 receives every shard from the first replica that holds it and joins the
shards; the other ranks only send.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_bridge import progress
from megatron_bridge.adapter_names import adapter_rules
from megatron_bridge.adapters import adapters_of
from megatron_bridge.architecture import Architecture
from megatron_bridge.atomic_folder import WRITE_FAILURES, atomic_folder, reason_and_file
from megatron_bridge.hf_folder import SafetensorsReader, write_model
from megatron_bridge.hf_weight_map import EMBEDDING, OUTPUT, Rule
from megatron_bridge.model import is_expert, named_parameters
from megatron_bridge.peft_folder import ADAPTER, write_adapter
from megatron_bridge.process_groups import raise_everywhere
from treepo.config.trainer import LoraConfig
from treepo.errors import ModelError
from treepo.weight_sync.wire import Manifest, TensorInfo


def load_weights(folder: Path, chunks: Sequence[GPTModel], architecture: Architecture) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Raises ModelError if a tensor is missing or has another shape than the parameter.
    """
    reader = SafetensorsReader(folder)
    rules = {rule.parameter: rule for rule in architecture.weight_rules()}
    if architecture.tied:
        rules[OUTPUT] = rules[EMBEDDING]  # the last pipeline stage has a copy
    for name, parameter in named_parameters(chunks).items():
        rule = rules[name]
        ranks, rank = (1, 0) if is_expert(parameter) else _tensor_ranks()
        tensors = [reader.read(tensor) for tensor in rule.tensors]
        shard = rule.surgery.split(tensors, ranks, architecture.dimensions)[rank]
        if shard.shape != parameter.shape:
            raise ModelError(
                f"{folder}: {' + '.join(rule.tensors)} give {tuple(shard.shape)} for {name}, "
                f"which has {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(shard)
        progress.count()


def _tensor_ranks() -> tuple[int, int]:
    """The number of tensor-parallel ranks, and this rank's number among them."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


@dataclass(frozen=True, slots=True)
class _Owner:
    """A rank that sends parameters to rank 0, with its tensor-parallel rank and the parameters' shapes."""

    rank: int
    tensor_rank: int
    shapes: dict[str, torch.Size]


def _first_to_hold(parameter: Parameter) -> bool:
    """Whether this rank is in the first replica that holds the parameter."""
    if is_expert(parameter):
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _exchange(operations: Sequence[dist.P2POp]) -> None:
    """Send or receive as one batch in the world's communicator.

    A single send or receive would make a communicator for each pair of ranks, with buffers on the device.
    """
    if operations:
        for work in dist.batch_isend_irecv(list(operations)):
            work.wait()


class WeightExporter:
    """Yields or writes the model's tensors under their Hugging Face names, on rank 0. Every method is
    collective.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        lora: LoraConfig | None,
    ) -> None:
        self._parameters = {
            name: parameter
            for name, parameter in named_parameters(chunks).items()
            if _first_to_hold(parameter)
        }
        self._adapters = dict(adapters_of(chunks))
        self._architecture, self._dtype, self._device = architecture, dtype, device
        self._rules = architecture.weight_rules()
        self._lora = lora
        self._adapter_rules = [] if lora is None else adapter_rules(architecture, lora.targets)
        self._rank = dist.get_rank()
        mine = _Owner(
            self._rank,
            _tensor_ranks()[1],
            {name: parameter.shape for name, parameter in self._parameters.items()},
        )
        everyone: list[_Owner] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self._owners = sorted(everyone, key=lambda owner: owner.tensor_rank)
        if device.type == "cuda" and len(everyone) > 1:
            # Makes the communicator that batches of a few ranks then use; making it takes all ranks.
            dist.all_reduce(torch.zeros(1, device=device))

    def manifest(self) -> Manifest:
        """Names, dtypes and shapes of what `tensors` yields; the same on every rank."""
        return self._announced(self._rules)

    def adapter_manifest(self) -> Manifest:
        """Likewise of what `adapters` yields."""
        return self._announced(self._adapter_rules)

    def _announced(self, rules: Sequence[Rule]) -> Manifest:
        return tuple(
            TensorInfo.of(name, tensor)
            for rule in rules
            for name, tensor in zip(
                rule.tensors,
                rule.surgery.join(
                    [
                        torch.empty(owner.shapes[rule.parameter], dtype=self._dtype, device="meta")
                        for owner in self._owners_of(rule)
                    ],
                    self._architecture.dimensions,
                ),
                strict=True,
            )
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor once on rank 0, in the order of the family's table; nothing on other ranks.

        Adapters are merged into the tensors.
        """
        yield from self._joined(self._rules)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Likewise every A and B under PEFT's name; nothing at all without `trainer.lora`."""
        yield from self._joined(self._adapter_rules)

    def _joined(self, rules: Sequence[Rule]) -> Iterator[tuple[str, Tensor]]:
        for rule in rules:
            shards = self._gather(rule)
            progress.count()
            if shards:
                joined = rule.surgery.join(shards, self._architecture.dimensions)
                del shards  # frees them while the receiver works
                yield from zip(rule.tensors, joined, strict=True)
                del joined  # frees it before the next parameter is gathered

    def _gather(self, rule: Rule) -> list[Tensor]:
        """On rank 0 the shards in tensor-parallel order, or one tensor if they are stacked.

        On other ranks an empty list.
        """
        owners = self._owners_of(rule)
        if self._rank != 0:
            if any(owner.rank == self._rank for owner in owners):
                _exchange([dist.P2POp(dist.isend, self._shard(rule), 0)])
            return []
        if rule.surgery.stacked and len(owners) > 1:
            rows, *rest = owners[0].shapes[rule.parameter]
            stack = torch.empty((len(owners), rows, *rest), dtype=self._dtype, device=self._device)
            if owners[0].rank == 0:
                stack[0].copy_(self._shard(rule))
            self._fetch(owners, list(stack))
            return [stack.flatten(0, 1)]
        shards = [
            self._shard(rule)
            if owner.rank == 0
            else torch.empty(owner.shapes[rule.parameter], dtype=self._dtype, device=self._device)
            for owner in owners
        ]
        self._fetch(owners, shards)
        return shards

    def _shard(self, rule: Rule) -> Tensor:
        """Return this rank's shard on the device, its adapters merged into it."""
        parameter = self._parameters[rule.parameter]
        shard = parameter.detach().to(self._device)  # it may be offloaded
        adapter = self._adapters.get(parameter)
        return shard if adapter is None else adapter.merged(shard)

    def _fetch(self, owners: Sequence[_Owner], shards: Sequence[Tensor]) -> None:
        """Receive the other ranks' shards."""
        _exchange(
            [
                dist.P2POp(dist.irecv, shard, owner.rank)
                for owner, shard in zip(owners, shards, strict=True)
                if owner.rank != 0
            ]
        )

    def _owners_of(self, rule: Rule) -> list[_Owner]:
        """The ranks whose shards are joined, in tensor-parallel order."""
        owners = [owner for owner in self._owners if rule.parameter in owner.shapes]
        return owners[:1] if rule.surgery.replicated else owners

    def write(self, source: Path, folder: Path) -> None:
        """Write a Hugging Face folder with these weights and `source`'s config and tokenizer; in its folder
        `adapter` the adapters by themselves, as PEFT's.

        Every rank raises ModelError if `folder` exists, and CheckpointError if it cannot be written.
        """
        exists = [folder.exists()]
        dist.broadcast_object_list(exists, src=0)
        if exists[0]:
            raise ModelError(f"{folder} exists: nothing is overwritten")
        adapters = dict(self.adapters())
        tensors = self.tensors()
        failure = ""
        if self._rank == 0:
            try:
                with atomic_folder(folder) as partial:
                    write_model(tensors, source, partial)
                    if self._lora is not None:
                        (partial / ADAPTER).mkdir()
                        write_adapter(partial / ADAPTER, adapters, self._lora, source)
            except WRITE_FAILURES as error:
                failure = f"{folder}: {reason_and_file(error)}"
        for _ in tensors:  # after a failure rank 0 receives the rest, because the others still send it
            pass
        raise_everywhere(failure)
