"""Lists an adapter's matrices: for each its Megatron-Core parameter, its tensor in PEFT's files, and how
tensor-parallel ranks divide it.
"""

from collections.abc import Sequence

from megatron_bridge.architecture import Architecture
from megatron_bridge.hf_weight_map import Rule
from megatron_bridge.tensor_surgery import COLUMNS, GATE_UP, QKV, ROWS, WHOLE
from treepo.data.peft_names import peft_name


def adapter_rules(architecture: Architecture, targets: Sequence[str]) -> list[Rule]:
    """For every A and B of the whole model its Megatron-Core parameter and its tensor in PEFT's files.

    In a mixture the projections of the MLP are those of experts, as PEFT reads the same targets; dense layers
    have none.
    """
    rules = []
    mixture = architecture.experts is not None
    for rule in architecture.weight_rules():
        if rule.surgery not in (QKV, GATE_UP, COLUMNS) or not rule.parameter.endswith(".weight"):
            continue
        if mixture and ".mlp." in rule.parameter and not of_expert(rule.parameter):
            continue
        parts = (("a", "A", WHOLE), ("b", "B", ROWS))
        if rule.surgery is COLUMNS:
            parts = (("a", "A", COLUMNS), ("b", "B", WHOLE))
        module = rule.parameter.removesuffix("weight")
        for tensor in rule.tensors:
            name = tensor.split(".")[-2]
            if name in targets:
                rules += [
                    Rule(f"{module}adapter.{matrix}.{name}", (peft_name(tensor, letter),), surgery)
                    for matrix, letter, surgery in parts
                ]
    return rules


def of_expert(name: str) -> bool:
    """Whether a parameter or tensor of this name is an expert's, and not of one that every token takes."""
    return ".mlp.experts." in name


def beside(rule: Rule) -> str:
    """The Megatron-Core parameter that the A or B of this rule is beside."""
    return rule.parameter.partition("adapter.")[0] + "weight"
