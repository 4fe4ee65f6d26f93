"""Moves weights from Hugging Face folders to the ranks, and from the ranks to those that send or write them.

The rank that joins a parameter receives the other shards from its own replica, or from the first one if it
holds no shard itself.
"""

import socket
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_bridge import progress
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
    """A rank with the shapes of its parameters. replica: number of the copy of the model that it belongs to.
    expert_replica: of its experts, whose names are in `experts`.
    """

    rank: int
    host: str
    tensor_rank: int
    replica: int
    expert_replica: int
    shapes: dict[str, torch.Size]
    experts: frozenset[str]

    @classmethod
    def this_rank(cls, parameters: Mapping[str, Parameter]) -> "_Owner":
        return cls(
            dist.get_rank(),
            socket.gethostname(),
            _tensor_ranks()[1],
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_rank(),
            {name: parameter.shape for name, parameter in parameters.items()},
            frozenset(name for name, parameter in parameters.items() if is_expert(parameter)),
        )

    def replica_of(self, parameter: str) -> int:
        return self.expert_replica if parameter in self.experts else self.replica


@dataclass(frozen=True, slots=True)
class Gathering:
    """One parameter that rank `target` joins from the shards of `owners`, which are in tensor-parallel order.

    infos: of the tensors.
    """

    rule: Rule
    owners: tuple[_Owner, ...]
    target: int
    infos: Manifest

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)


def _exchange(operations: Sequence[dist.P2POp]) -> None:
    """Send or receive as one batch in the world's communicator.

    A single send or receive would make a communicator for each pair of ranks, with buffers on the device.
    """
    if operations:
        for work in dist.batch_isend_irecv(list(operations)):
            work.wait()


class WeightExporter:
    """Joins tensors under their names in files. Methods that return tensors, and `write`, are collective.

    rules: of the parameters: all of the model, to whose tensors adapters are added, or those of the adapters.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        rules: Sequence[Rule],
    ) -> None:
        self._parameters = named_parameters(chunks)
        self._adapters = dict(adapters_of(chunks))
        self._architecture, self._dtype, self._device = architecture, dtype, device
        self.rules = rules
        self._rank = dist.get_rank()
        mine = _Owner.this_rank(self._parameters)
        everyone: list[_Owner] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self.hosts = [owner.host for owner in everyone]  # of all ranks
        self._owners: dict[str, list[_Owner]] = defaultdict(list)  # in tensor-parallel order
        for owner in sorted(everyone, key=lambda owner: owner.tensor_rank):
            for name in owner.shapes:
                self._owners[name].append(owner)
        self._infos = {rule.parameter: self._joined_infos(rule) for rule in self.rules}
        if device.type == "cuda" and len(everyone) > 1:
            # Makes the communicator that batches of a few ranks then use; making it takes all ranks.
            dist.all_reduce(torch.zeros(1, device=device))

    def manifest(self) -> Manifest:
        """Names, dtypes and shapes of what `tensors` yields; the same on every rank."""
        return tuple(chain.from_iterable(map(self.infos, self.rules)))

    def infos(self, rule: Rule) -> Manifest:
        """The tensors of one parameter."""
        return self._infos[rule.parameter]

    def _joined_infos(self, rule: Rule) -> Manifest:
        shards = [
            torch.empty(owner.shapes[rule.parameter], dtype=self._dtype, device="meta")
            for owner in self._owners_for(rule, 0)
        ]
        joined = rule.surgery.join(shards, self._architecture.dimensions)
        return tuple(map(TensorInfo.of, rule.tensors, joined))

    def holders(self, rule: Rule) -> frozenset[int]:
        """The ranks that hold a shard of the parameter."""
        return frozenset(owner.rank for owner in self._owners[rule.parameter])

    def gathering(self, rule: Rule, target: int) -> Gathering:
        """How rank `target` joins the parameter."""
        return Gathering(rule, self._owners_for(rule, target), target, self.infos(rule))

    def _owners_for(self, rule: Rule, target: int) -> tuple[_Owner, ...]:
        """The ranks whose shards rank `target` joins: those of its own replica, if that has the parameter."""
        name, owners = rule.parameter, self._owners[rule.parameter]
        first = min(owner.replica_of(name) for owner in owners)
        replica = next((owner.replica_of(name) for owner in owners if owner.rank == target), first)
        chosen = [owner for owner in owners if owner.replica_of(name) == replica]
        if rule.surgery.replicated:
            chosen = [next((owner for owner in chosen if owner.rank == target), chosen[0])]
        return tuple(chosen)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor once on rank 0, in the order of the family's table; nothing on other ranks."""
        for rule in self.rules:
            joined = self.gather([self.gathering(rule, 0)])
            yield from joined
            del joined  # frees it before the next parameter is gathered

    def gather(self, step: Sequence[Gathering]) -> list[tuple[str, Tensor]]:
        """Join several parameters at once, at most one on each rank; return the tensors of this rank's."""
        operations, shards, mine = [], [], None
        for gathering in step:
            if gathering.target == self._rank:
                mine, (shards, receiving) = gathering, self._shards(gathering)
                operations += receiving
            elif any(owner.rank == self._rank for owner in gathering.owners):
                operations.append(dist.P2POp(dist.isend, self._shard(gathering.rule), gathering.target))
        _exchange(operations)
        progress.count()
        if mine is None:
            return []
        joined = mine.rule.surgery.join(shards, self._architecture.dimensions)
        return list(zip(mine.rule.tensors, joined, strict=True))

    def _shards(self, gathering: Gathering) -> tuple[list[Tensor], list[dist.P2POp]]:
        """Room for the shards, in tensor-parallel order or stacked as one tensor, and what receives those of
        other ranks.
        """
        name, owners = gathering.rule.parameter, gathering.owners
        shards: list[Tensor] = []
        whole = None
        if gathering.rule.surgery.stacked and len(owners) > 1:
            rows, *rest = owners[0].shapes[name]
            whole = torch.empty((len(owners), rows, *rest), dtype=self._dtype, device=self._device)
        for index, owner in enumerate(owners):
            own = self._shard(gathering.rule) if owner.rank == self._rank else None
            if whole is not None:
                shards.append(whole[index] if own is None else whole[index].copy_(own))
            elif own is not None:
                shards.append(own)
            else:
                shards.append(torch.empty(owner.shapes[name], dtype=self._dtype, device=self._device))
        receiving = [
            dist.P2POp(dist.irecv, shard, owner.rank)
            for owner, shard in zip(owners, shards, strict=True)
            if owner.rank != self._rank
        ]
        return shards if whole is None else [whole.flatten(0, 1)], receiving

    def _shard(self, rule: Rule) -> Tensor:
        """Return this rank's shard on the device, its adapters merged into it."""
        parameter = self._parameters[rule.parameter]
        shard = parameter.detach().to(self._device)  # it may be offloaded
        adapter = self._adapters.get(parameter)
        return shard if adapter is None else adapter.merged(shard)

    def write(
        self, source: Path, folder: Path, lora: LoraConfig | None, adapters: "WeightExporter | None"
    ) -> None:
        """Write a Hugging Face folder with these weights and `source`'s config and tokenizer; in its folder
        `adapter` the adapters by themselves, as PEFT's.

        Every rank raises ModelError if `folder` exists, and CheckpointError if it cannot be written.
        """
        exists = [folder.exists()]
        dist.broadcast_object_list(exists, src=0)
        if exists[0]:
            raise ModelError(f"{folder} exists: nothing is overwritten")
        alone = {} if adapters is None else {name: tensor.cpu() for name, tensor in adapters.tensors()}
        tensors = self.tensors()
        failure = ""
        if self._rank == 0:
            try:
                with atomic_folder(folder) as partial:
                    write_model(tensors, source, partial)
                    if lora is not None:
                        (partial / ADAPTER).mkdir()
                        write_adapter(partial / ADAPTER, alone, lora, source)
            except WRITE_FAILURES as error:
                failure = f"{folder}: {reason_and_file(error)}"
        deque(tensors, maxlen=0)  # after a failure rank 0 receives the rest, because the others still send it
        raise_everywhere(failure)
