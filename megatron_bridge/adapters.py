"""Adapters (LoRA): low-rank matrices A and B beside frozen projections, which give alpha / rank times B A x.

Each projection of transformers has its own A and B, as in PEFT, though Megatron-Core computes q, k and v, and
gate and up, as one matrix. A rank holds the part of them that belongs to its shard of that matrix:

    matrix whose output is divided   A whole on every rank, B divided by rows
    matrix whose input is divided    A divided by columns, B whole on every rank

Ranks exchange the `rank` values of each token between A and B instead of hidden states. With sequence
parallelism a whole matrix sees each rank's own tokens, and Megatron-Core sums the ranks' gradients; without
it all ranks compute the same gradient. An expert is whole on its rank, and so are its adapters.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.nn import Module, Parameter, ParameterDict
from torch.nn.functional import linear

from megatron_bridge.adapter_names import adapter_rules, beside
from megatron_bridge.architecture import Architecture
from megatron_bridge.hf_weight_map import Rule
from megatron_bridge.model import is_expert, named_parameters
from megatron_bridge.tensor_surgery import COLUMNS, ROWS, WHOLE
from treepo.config.trainer import LoraConfig

Exchange = Callable[[Tensor], Tensor]

_AXES = {ROWS: 0, COLUMNS: 1, WHOLE: None}
"""The axis along which tensor-parallel ranks divide a matrix of an adapter."""


class Adapter(Module):
    """The adapters of the projections that one Megatron-Core matrix computes.

    rows: this rank's outputs of each projection; one without adapter gets 0. exchange: turns the values that
    a rank has computed with its A into those that its B needs. arrange: puts outputs of all projections, in
    the order of `rows`, together as the matrix does.
    """

    def __init__(
        self,
        lora: LoraConfig,
        columns: int,
        rows: dict[str, int],
        exchange: Exchange,
        arrange: Callable[[list[Tensor]], Tensor],
    ) -> None:
        super().__init__()
        self.scale = lora.alpha / lora.rank
        self.enabled = True
        self._rows, self._exchange, self._arrange = rows, exchange, arrange
        names = [name for name in rows if name in lora.targets]
        self.a = ParameterDict({name: Parameter(torch.empty(lora.rank, columns)) for name in names})
        self.b = ParameterDict({name: Parameter(torch.empty(rows[name], lora.rank)) for name in names})

    def forward(self, states: Tensor) -> Tensor:
        """The term, before scaling, that is added to the matrix's output for its input `states`."""
        inner = self._exchange(linear(states, torch.cat(list(self.a.values()))))
        parts = dict(zip(self.b, inner.chunk(len(self.b), dim=-1), strict=True))
        return self._arrange(
            [
                linear(parts[name], self.b[name])
                if name in parts
                else inner.new_zeros(*inner.shape[:-1], rows)
                for name, rows in self._rows.items()
            ]
        )

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Add the adapters to a rank's shard of the matrix, in float32, and round the sum to its dtype."""
        wide = {
            name: (self.a[name].to(weight.device).float(), self.b[name].to(weight.device).float())
            for name in self.a
        }
        columns = weight.shape[1]
        product = self._arrange(
            [
                (wide[name][1] @ wide[name][0]).t()
                if name in wide
                else weight.new_zeros(columns, rows, dtype=torch.float32)
                for name, rows in self._rows.items()
            ]
        )
        merged = weight.to(torch.float32, copy=True).add_(product.t(), alpha=self.scale)
        del product  # before the sum is rounded
        return merged.to(weight.dtype)


def add_adapters(
    chunks: Sequence[GPTModel], architecture: Architecture, lora: LoraConfig, device: torch.device
) -> None:
    """Freeze this rank's part of the model and put adapters beside its projections.

    B is 0, so the model computes what it computed. A is uniform within 1 / sqrt(columns), as PEFT's, by a
    generator that depends on its name alone: the same at every layout, in every run.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        names = {id(parameter): name for name, parameter in named_parameters([chunk]).items()}
        dtype = next(chunk.parameters()).dtype
        rules = adapter_rules(architecture, lora.targets)
        adapted = {beside(rule) for rule in rules}
        for module in list(chunk.modules()):
            name = names.get(id(getattr(module, "weight", None)))
            if name in adapted:
                assert name is not None
                exchange = _exchange(module, chunk.config.sequence_parallel)
                adapter = _adapter_of(name, module, architecture, lora, exchange)
                module.add_module("adapter", adapter.to(device, dtype))
                module.register_forward_hook(_add_term)
        if chunk.config.recompute_granularity == "full" and chunk.pre_process:
            # A recomputed layer passes no gradient to its parameters unless its input wants one.
            chunk.embedding.register_forward_hook(lambda _, __, states: states.requires_grad_())
        named = named_parameters([chunk])
        for rule in rules:
            if rule.parameter in named:
                expert = is_expert(named[beside(rule)])
                _initialise(named[rule.parameter], rule, expert, chunk.config.sequence_parallel)


def adapters_of(chunks: Sequence[Module]) -> Iterator[tuple[Parameter, Adapter]]:
    """Each frozen weight of the chunks that has an adapter, with it."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(adapter := getattr(module, "adapter", None), Adapter):
                yield module.weight, adapter  # type: ignore[misc]  # a linear's


def sharded_adapters(chunk: Any) -> dict[str, ShardedTensor]:
    """A chunk's adapters as sharded tensors, which share their memory, by their names in the chunk."""
    ranks, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    expert_replica = parallel_state.get_expert_data_parallel_rank()
    keys = {id(parameter): key for key, parameter in named_parameters([chunk]).items()}
    sharded = {}
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            divided = parameter.tensor_model_parallel  # type: ignore[attr-defined]  # Megatron-Core's mark
            offset = (parameter.partition_dim, rank, ranks)  # type: ignore[attr-defined]  # likewise
            sharded[name] = ShardedTensor.from_rank_offsets(
                keys[id(parameter)],
                parameter,
                *([offset] if divided else []),
                replica_id=(0, 0, expert_replica)
                if is_expert(parameter)
                else (0, 0 if divided else rank, replica),
            )
    return sharded


def _add_term(module: Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None]):
    """Torch's hook: what the module returns is its own output and the adapters' term."""
    adapter = module.adapter
    assert isinstance(adapter, Adapter)
    if not adapter.enabled:
        return outputs
    output, bias = outputs
    return output.add(adapter(inputs[0]), alpha=adapter.scale), bias


def _adapter_of(
    name: str, module: Module, architecture: Architecture, lora: LoraConfig, exchange: Exchange
) -> Adapter:
    """The adapter, uninitialised, of the module whose weight has this name in the table."""
    weight = module.weight
    assert isinstance(weight, Parameter)
    rows, columns = weight.shape
    matrix = name.split(".")[-2]
    build = partial(Adapter, lora, columns, exchange=exchange)
    if matrix == "linear_qkv":
        keys = rows // (architecture.heads // architecture.dimensions.groups + 2)
        groups = keys // architecture.dimensions.head_dim
        sizes = {"q_proj": rows - 2 * keys, "k_proj": keys, "v_proj": keys}
        return build(sizes, arrange=partial(_by_groups, groups))
    if matrix == "linear_fc1":
        return build({"gate_proj": rows // 2, "up_proj": rows // 2}, arrange=partial(torch.cat, dim=-1))
    return build({{"linear_proj": "o_proj", "linear_fc2": "down_proj"}[matrix]: rows}, arrange=_alone)


def _exchange(module: Module, sequence_parallel: bool) -> Exchange:
    """How tensor-parallel ranks exchange the values between A and B beside this linear."""
    if is_expert(module.weight):  # type: ignore[arg-type]  # a linear's
        return nn.Identity()
    if isinstance(module, tensor_parallel.ColumnParallelLinear):
        if sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region
        return tensor_parallel.copy_to_tensor_model_parallel_region
    if sequence_parallel:
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region
    return tensor_parallel.reduce_from_tensor_model_parallel_region


def _by_groups(groups: int, outputs: list[Tensor]) -> Tensor:
    """Queries, keys and values interleaved by group (`tensor_surgery`), along the last axis."""
    return torch.cat([output.unflatten(-1, (groups, -1)) for output in outputs], dim=-1).flatten(-2)


def _alone(outputs: list[Tensor]) -> Tensor:
    (output,) = outputs
    return output


@torch.no_grad()
def _initialise(parameter: Parameter, rule: Rule, expert: bool, sequence_parallel: bool) -> None:
    """Give an A or B its first values, and the marks by which Megatron-Core reduces its gradient."""
    axis = None if expert else _AXES[rule.surgery]
    parameter.allreduce = not expert  # type: ignore[attr-defined]  # Megatron-Core's mark
    if axis is None and not expert:
        parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]  # likewise
    set_tensor_model_parallel_attributes(parameter, axis is not None, -1 if axis is None else axis, 1)
    if ".adapter.b." in rule.parameter:
        parameter.zero_()
        return
    ranks = parallel_state.get_tensor_model_parallel_world_size() if axis == 1 else 1
    rank = parallel_state.get_tensor_model_parallel_rank() if axis == 1 else 0
    rows, columns = parameter.shape
    whole = torch.empty(rows, columns * ranks)
    whole.uniform_(-1.0, 1.0, generator=torch.Generator().manual_seed(zlib.crc32(rule.tensors[0].encode())))
    parameter.copy_((whole / whole.shape[1] ** 0.5).chunk(ranks, dim=1)[rank])
