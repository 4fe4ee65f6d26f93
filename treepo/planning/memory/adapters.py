"""The adapters (`trainer.lora`) that a rank holds, from the shapes of the weights that they are beside."""

from collections.abc import Sequence

from megatron_bridge.adapter_names import adapter_rules, beside, of_expert
from megatron_bridge.architecture import Architecture, tensor_shapes
from megatron_bridge.layout_shards import ShardParameter
from megatron_bridge.peft_folder import adapter_shapes
from megatron_bridge.tensor_surgery import ROWS
from treepo.config.trainer import LoraConfig, ParallelConfig
from treepo.data.peft_names import weight_name

MERGING = 8
"""Bytes of a value while its weight is merged: sum and product in float32 (`Adapter.merged`)."""


def adapters_of(
    chunk: Sequence[ShardParameter], architecture: Architecture, parallel: ParallelConfig, lora: LoraConfig
) -> list[ShardParameter]:
    """The adapters of one rank's model chunk."""
    held = {each.name: each for each in chunk}
    rows = {name: shape[0] for name, shape in tensor_shapes(architecture).items()}
    adapters = []
    for rule in adapter_rules(architecture, lora.targets):
        base = held.get(beside(rule))
        if base is None:
            continue
        (tensor,) = rule.tensors
        if ".adapter.a." in rule.parameter:
            shape = (lora.rank, base.shape[1])
        elif rule.surgery is ROWS:
            divisor = 1 if base.expert else parallel.tensor
            shape = (rows[weight_name(tensor)] // divisor, lora.rank)
        else:
            shape = (base.shape[0], lora.rank)
        adapters.append(ShardParameter(rule.parameter, shape, base.expert))
    return adapters


def adapter_count(architecture: Architecture, lora: LoraConfig | None, expert: bool | None = None) -> int:
    """The values of all adapters of the whole model; `expert` counts only those of experts (True) or of the
    rest (False).
    """
    shapes = {} if lora is None else adapter_shapes(architecture, lora)
    return sum(a * b for name, (a, b) in shapes.items() if expert in (None, of_expert(name)))


def adapted_parameters(architecture: Architecture, lora: LoraConfig) -> set[str]:
    """The parameters with adapters, which a sync merges."""
    return set(map(beside, adapter_rules(architecture, lora.targets)))
