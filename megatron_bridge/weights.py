"""How Hugging Face names a model's tensors and how Megatron-Core lays them out: one table per family.

A rule pairs one Megatron parameter with the Hugging Face tensors that it holds. Its surgery turns those
into the shards of the tensor-parallel ranks and back, bit for bit; both directions are pure functions.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the surgery must know of a model."""

    layers: int
    groups: int  # key-value heads
    head_dim: int
    vocabulary: int
    experts: int = 0  # of each sparse layer
    sparse_layers: tuple[int, ...] = ()  # those with experts in place of the MLP, counted from 0


Split = Callable[[Sequence[Tensor], int, Dimensions], list[Tensor]]
Join = Callable[[Sequence[Tensor], Dimensions], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Surgery:
    """split: a rule's Hugging Face tensors to one shard a rank. join: the shards back to the tensors.

    replicated: every rank holds the same tensor; one shard suffices to join. stacked: the shards are the rows
    of one tensor, and may be joined as that tensor: the largest is then never held twice.
    """

    split: Split
    join: Join
    replicated: bool = False
    stacked: bool = False


def _split_qkv(tensors: Sequence[Tensor], ranks: int, dimensions: Dimensions) -> list[Tensor]:
    """Megatron-Core interleaves by group: the group's query heads, its key head, its value head."""
    grouped = [tensor.unflatten(0, (dimensions.groups, -1)) for tensor in tensors]
    return list(torch.cat(grouped, dim=1).flatten(0, 1).chunk(ranks))


def _join_qkv(shards: Sequence[Tensor], dimensions: Dimensions) -> list[Tensor]:
    grouped = torch.cat(list(shards)).unflatten(0, (dimensions.groups, -1))
    size = dimensions.head_dim
    parts = grouped.split([grouped.shape[1] - 2 * size, size, size], dim=1)
    return [part.flatten(0, 1) for part in parts]


def _split_gate_up(tensors: Sequence[Tensor], ranks: int, _: Dimensions) -> list[Tensor]:
    """A rank's rows of the gate, then its rows of the up projection."""
    gate, up = (tensor.chunk(ranks) for tensor in tensors)
    return [torch.cat(pair) for pair in zip(gate, up, strict=True)]


def _join_gate_up(shards: Sequence[Tensor], _: Dimensions) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def padded_vocabulary(vocabulary: int, ranks: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel ranks."""
    return -(-vocabulary // ranks) * ranks


def _split_vocabulary(tensors: Sequence[Tensor], ranks: int, dimensions: Dimensions) -> list[Tensor]:
    (table,) = tensors
    missing = padded_vocabulary(dimensions.vocabulary, ranks) - dimensions.vocabulary
    return list(torch.cat([table, table.new_zeros(missing, table.shape[1])]).chunk(ranks))


def _join_vocabulary(shards: Sequence[Tensor], dimensions: Dimensions) -> list[Tensor]:
    table = shards[0] if len(shards) == 1 else torch.cat(list(shards))
    return [table[: dimensions.vocabulary]]


WHOLE = Surgery(
    lambda tensors, ranks, _: list(tensors) * ranks, lambda shards, _: [shards[0]], replicated=True
)
COLUMNS = Surgery(
    lambda tensors, ranks, _: list(tensors[0].chunk(ranks, dim=1)),
    lambda shards, _: [torch.cat(list(shards), dim=1)],
)
QKV = Surgery(_split_qkv, _join_qkv)
GATE_UP = Surgery(_split_gate_up, _join_gate_up)
VOCABULARY = Surgery(_split_vocabulary, _join_vocabulary, stacked=True)


class Layers(Enum):
    """Which layers a rule is about."""

    NONE = auto()  # before or after the layers
    EVERY = auto()
    DENSE = auto()
    SPARSE = auto()


@dataclass(frozen=True, slots=True)
class Rule:
    """`{layer}` in a name stands for the layer, counted over all pipeline stages, `{expert}` for the expert,
    counted over all expert-parallel ranks.
    """

    parameter: str
    tensors: tuple[str, ...]
    surgery: Surgery
    layers: Layers = Layers.EVERY


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: its table in the order of its Hugging Face tensors, and what its layers have."""

    rules: tuple[Rule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False


MEGATRON, HUGGING_FACE = "decoder.layers.{layer}.", "model.layers.{layer}."


def _decoder(attention: tuple[Rule, ...] = (), mlp: tuple[Rule, ...] = ()) -> tuple[Rule, ...]:
    """The table of a decoder of pre-normed attention and gated MLP, with further rules for either."""
    return (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY, Layers.NONE),
        Rule(MEGATRON + "input_layernorm.weight", (HUGGING_FACE + "input_layernorm.weight",), WHOLE),
        Rule(
            MEGATRON + "self_attention.linear_qkv.weight",
            tuple(HUGGING_FACE + f"self_attn.{name}_proj.weight" for name in "qkv"),
            QKV,
        ),
        *attention,
        Rule(
            MEGATRON + "self_attention.linear_proj.weight",
            (HUGGING_FACE + "self_attn.o_proj.weight",),
            COLUMNS,
        ),
        Rule(
            MEGATRON + "pre_mlp_layernorm.weight", (HUGGING_FACE + "post_attention_layernorm.weight",), WHOLE
        ),
        *_mlp("mlp.", "mlp.", Layers.DENSE),
        *mlp,
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE, Layers.NONE),
        Rule("output_layer.weight", ("lm_head.weight",), VOCABULARY, Layers.NONE),
    )


def _mlp(megatron: str, hugging_face: str, layers: Layers) -> tuple[Rule, Rule]:
    """A gated MLP, under the names that it has within its layer."""
    mega, hf = MEGATRON + megatron, HUGGING_FACE + hugging_face
    return (
        Rule(mega + "linear_fc1.weight", (hf + "gate_proj.weight", hf + "up_proj.weight"), GATE_UP, layers),
        Rule(mega + "linear_fc2.weight", (hf + "down_proj.weight",), COLUMNS, layers),
    )


_QKV_BIAS = Rule(
    MEGATRON + "self_attention.linear_qkv.bias",
    tuple(HUGGING_FACE + f"self_attn.{name}_proj.bias" for name in "qkv"),
    QKV,
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

FAMILIES = {  # by `model_type` of config.json
    "qwen2": Family(_decoder((_QKV_BIAS,)), qkv_bias=True),
    "qwen3": Family(_decoder(_QK_NORM), qk_norm=True),
    "qwen3_moe": Family(_decoder(_QK_NORM, _EXPERTS), qk_norm=True),
    "llama": Family(_decoder()),
}


TRANSFORMER_ENGINE_NAMES = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"experts\.(linear_fc[12])\.weight(\d+)$", r"experts.local_experts.\2.\1.weight"),
)
"""Its modules fuse a norm with the matrix after it, and hold all of a rank's experts."""


def global_name(name: str, layers: Sequence[int], first_expert: int) -> str:
    """A rule's name of the parameter that is `name` in a chunk of the model whose layers are `layers` of the
    whole and whose experts are counted from `first_expert`.
    """
    for pattern, ours in TRANSFORMER_ENGINE_NAMES:
        name = re.sub(pattern, ours, name)
    name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda layer: str(layers[int(layer[0])]), name)
    return re.sub(r"(?<=local_experts\.)\d+", lambda expert: str(first_expert + int(expert[0])), name)


def expand(rules: Sequence[Rule], dimensions: Dimensions) -> list[Rule]:
    """The rules with their layers and experts filled in, layer by layer, expert by expert."""
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
