"""Maps Hugging Face tensor names to Megatron-Core parameters: one table for each model family.

A rule pairs one Megatron-Core parameter with the Hugging Face tensors that it holds and with the surgery that
turns one into the other (`tensor_surgery`). A family is a decoder with gated MLPs and the parts that it adds
to one; to add a family, name its parts in FAMILIES.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby

from megatron_bridge.tensor_surgery import COLUMNS, GATE_UP, QKV, VOCABULARY, WHOLE, Dimensions, Surgery


class Layers(Enum):
    """The layers that a rule applies to."""

    NONE = auto()  # the parameter is before or after the layers
    EVERY = auto()
    DENSE = auto()
    SPARSE = auto()


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron-Core parameter and the Hugging Face tensors that it holds.

    `{layer}` in a name stands for the layer, counted over all pipeline stages; `{expert}` for the expert,
    counted over all expert-parallel ranks.
    """

    parameter: str
    tensors: tuple[str, ...]
    surgery: Surgery
    layers: Layers = Layers.EVERY


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
MEGATRON, HUGGING_FACE = "decoder.layers.{layer}.", "model.layers.{layer}."


def _mlp(megatron: str, hugging_face: str, layers: Layers) -> tuple[Rule, Rule]:
    """The two rules of a gated MLP; `megatron` and `hugging_face` are its names within the layer."""
    mega, hf = MEGATRON + megatron, HUGGING_FACE + hugging_face
    return (
        Rule(mega + "linear_fc1.weight", (hf + "gate_proj.weight", hf + "up_proj.weight"), GATE_UP, layers),
        Rule(mega + "linear_fc2.weight", (hf + "down_proj.weight",), COLUMNS, layers),
    )


def _attention(module: str, names: str, kind: str, surgery: Surgery) -> Rule:
    """The rule of one parameter of the attention: `module`'s `kind`, made of the projections `names`."""
    return Rule(
        MEGATRON + f"self_attention.{module}.{kind}",
        tuple(HUGGING_FACE + f"self_attn.{name}_proj.{kind}" for name in names),
        surgery,
    )


_QK_NORM = tuple(
    Rule(
        MEGATRON + f"self_attention.{name}_layernorm.weight",
        (HUGGING_FACE + f"self_attn.{name}_norm.weight",),
        WHOLE,
    )
    for name in "qk"
)
_EXPERTS = (
    Rule(MEGATRON + "mlp.router.weight", (HUGGING_FACE + "mlp.gate.weight",), WHOLE, Layers.SPARSE),
    *_mlp("mlp.experts.local_experts.{expert}.", "mlp.experts.{expert}.", Layers.SPARSE),
)
_SHARED_EXPERT = (
    *_mlp("mlp.shared_experts.", "mlp.shared_expert.", Layers.SPARSE),
    Rule(
        MEGATRON + "mlp.shared_experts.gate_weight",
        (HUGGING_FACE + "mlp.shared_expert_gate.weight",),
        WHOLE,
        Layers.SPARSE,
    ),
)


@dataclass(frozen=True, slots=True)
class Family:
    """A pre-norm decoder with rotary attention and gated MLPs, and the parts that a model family adds to it.

    qkv_bias, output_bias: biases of the attention's input and output projections. qk_norm: norms of each
    head's queries and keys. experts: in place of the MLP of some layers. shared_expert: an expert for every
    token beside them, times the sigmoid of a gate. optional_bias: `attention_bias` in config.json adds both
    biases.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    shared_expert: bool = False
    optional_bias: bool = False

    def with_attention_bias(self) -> "Family":
        """The family's models with `attention_bias`."""
        assert self.optional_bias
        return replace(self, qkv_bias=True, output_bias=True)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The table, in the order of the Hugging Face tensors."""
        return (
            Rule(EMBEDDING, ("model.embed_tokens.weight",), VOCABULARY, Layers.NONE),
            Rule(MEGATRON + "input_layernorm.weight", (HUGGING_FACE + "input_layernorm.weight",), WHOLE),
            _attention("linear_qkv", "qkv", "weight", QKV),
            *([_attention("linear_qkv", "qkv", "bias", QKV)] if self.qkv_bias else ()),
            *(_QK_NORM if self.qk_norm else ()),
            _attention("linear_proj", "o", "weight", COLUMNS),
            *([_attention("linear_proj", "o", "bias", WHOLE)] if self.output_bias else ()),
            Rule(
                MEGATRON + "pre_mlp_layernorm.weight",
                (HUGGING_FACE + "post_attention_layernorm.weight",),
                WHOLE,
            ),
            *_mlp("mlp.", "mlp.", Layers.DENSE),
            *(_EXPERTS if self.experts else ()),
            *(_SHARED_EXPERT if self.shared_expert else ()),
            Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE, Layers.NONE),
            Rule(OUTPUT, ("lm_head.weight",), VOCABULARY, Layers.NONE),
        )


FAMILIES = {  # the keys are config.json's `model_type`
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True, experts=True, shared_expert=True),
    "qwen3": Family(qk_norm=True, optional_bias=True),
    "qwen3_moe": Family(qk_norm=True, experts=True, optional_bias=True),
    "llama": Family(optional_bias=True),
    "mistral": Family(),
}


TRANSFORMER_ENGINE_NAMES = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"experts\.(linear_fc[12])\.weight(\d+)$", r"experts.local_experts.\2.\1.weight"),
)
"""Patterns of Transformer Engine's names, and their replacements. It fuses a norm with the matrix after it,
and one of its modules holds all of a rank's experts.
"""


def global_name(name: str, layers: Sequence[int], first_expert: int) -> str:
    """The table's name for a chunk's parameter `name`.

    layers: the numbers of the chunk's layers in the whole model. first_expert: that of its first expert.
    """
    for pattern, ours in TRANSFORMER_ENGINE_NAMES:
        name = re.sub(pattern, ours, name)
    name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda layer: str(layers[int(layer[0])]), name)
    return re.sub(r"(?<=local_experts\.)\d+", lambda expert: str(first_expert + int(expert[0])), name)


def expand(rules: Sequence[Rule], dimensions: Dimensions) -> list[Rule]:
    """The rules with every layer and expert filled in, in the order of the Hugging Face tensors."""
    expanded: list[Rule] = []
    for inside, group in groupby(rules, key=lambda rule: rule.layers is not Layers.NONE):
        group = list(group)
        for layer in range(dimensions.layers) if inside else (0,):
            kind = Layers.SPARSE if layer in dimensions.sparse_layers else Layers.DENSE
            applying = [rule for rule in group if not inside or rule.layers in (Layers.EVERY, kind)]
            expanded += _filled(applying, layer, dimensions.experts)
    return expanded


def _filled(rules: Sequence[Rule], layer: int, experts: int) -> Iterator[Rule]:
    for of_experts, group in groupby(rules, key=lambda rule: "{expert}" in rule.parameter):
        group = list(group)
        for expert in range(experts) if of_experts else (0,):
            for rule in group:
                parameter, *tensors = (
                    name.format(layer=layer, expert=expert) for name in (rule.parameter, *rule.tensors)
                )
                yield replace(rule, parameter=parameter, tensors=tuple(tensors))
