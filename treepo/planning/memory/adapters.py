"""The adapters (`trainer.lora`) that a rank holds, from the shapes of the weights that they are beside."""

from collections.abc import Sequence

from megatron_bridge.adapter_names import adapter_rules
from megatron_bridge.architecture import Architecture, tensor_shapes
from megatron_bridge.layout_shards import Shard, ShardParameter
from megatron_bridge.peft_folder import adapter_shapes, weight_name
from megatron_bridge.tensor_surgery import ROWS
from treepo.config.trainer import LoraConfig, ParallelConfig

MERGING = 8
"""Bytes of a value while its weight is merged: sum and product in float32 (`Adapter.merged`)."""


def adapters_of(
    chunk: Sequence[ShardParameter], architecture: Architecture, parallel: ParallelConfig, lora: LoraConfig
) -> list[ShardParameter]:
    """The adapters of one rank's model chunk."""
    held = {each.name: each.shape for each in chunk}
    rows = {name: shape[0] for name, shape in tensor_shapes(architecture).items()}
    adapters = []
    for rule in adapter_rules(architecture, lora.targets):
        base = held.get(rule.parameter.partition("adapter.")[0] + "weight")
        if base is None:
            continue
        (tensor,) = rule.tensors
        if ".adapter.a." in rule.parameter:
            shape = (lora.rank, base[1])
        elif rule.surgery is ROWS:
            shape = (rows[weight_name(tensor)] // parallel.tensor, lora.rank)
        else:
            shape = (base[0], lora.rank)
        adapters.append(ShardParameter(rule.parameter, shape, expert=False))
    return adapters


def adapter_count(architecture: Architecture, lora: LoraConfig | None) -> int:
    """The values of all adapters of the whole model."""
    return 0 if lora is None else sum(a * b for a, b in adapter_shapes(architecture, lora).values())


def largest_merged(shards: Sequence[Shard], architecture: Architecture, lora: LoraConfig) -> int:
    """The values of the largest shard with adapters, which a sync merges."""
    adapted = {
        rule.parameter.partition("adapter.")[0] + "weight"
        for rule in adapter_rules(architecture, lora.targets)
    }
    return max(each.elements for shard in shards for each in shard.parameters if each.name in adapted)
