"""How Hugging Face names a model's tensors and how Megatron-Core lays them out: one table per family.

A rule pairs one Megatron parameter with the Hugging Face tensors that it holds. Its surgery turns those
into the shards of the tensor-parallel ranks and back, bit for bit; both directions are pure functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the surgery must know of a model."""

    layers: int
    groups: int  # key-value heads
    head_dim: int
    vocabulary: int


Split = Callable[[Sequence[Tensor], int, Dimensions], list[Tensor]]
Join = Callable[[Sequence[Tensor], Dimensions], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Surgery:
    """split: a rule's Hugging Face tensors to one shard a rank. join: the shards back to the tensors.

    replicated: every rank holds the same tensor; one shard suffices to join.
    """

    split: Split
    join: Join
    replicated: bool = False


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
    return [torch.cat(list(shards))[: dimensions.vocabulary]]


WHOLE = Surgery(
    lambda tensors, ranks, _: list(tensors) * ranks, lambda shards, _: [shards[0]], replicated=True
)
COLUMNS = Surgery(
    lambda tensors, ranks, _: list(tensors[0].chunk(ranks, dim=1)),
    lambda shards, _: [torch.cat(list(shards), dim=1)],
)
QKV = Surgery(_split_qkv, _join_qkv)
GATE_UP = Surgery(_split_gate_up, _join_gate_up)
VOCABULARY = Surgery(_split_vocabulary, _join_vocabulary)


@dataclass(frozen=True, slots=True)
class Rule:
    """`{}` in a name stands for the layer, counted over all pipeline stages."""

    parameter: str
    tensors: tuple[str, ...]
    surgery: Surgery


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: its table in the order of its Hugging Face tensors, and what its layers have."""

    rules: tuple[Rule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False


def _attention(*extra: Rule) -> tuple[Rule, ...]:
    """The table of a decoder of pre-normed attention and gated MLP, with `extra` rules for its attention."""
    mega, hf = "decoder.layers.{}.", "model.layers.{}."
    return (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY),
        Rule(mega + "input_layernorm.weight", (hf + "input_layernorm.weight",), WHOLE),
        Rule(
            mega + "self_attention.linear_qkv.weight",
            tuple(hf + f"self_attn.{name}_proj.weight" for name in "qkv"),
            QKV,
        ),
        *extra,
        Rule(mega + "self_attention.linear_proj.weight", (hf + "self_attn.o_proj.weight",), COLUMNS),
        Rule(mega + "pre_mlp_layernorm.weight", (hf + "post_attention_layernorm.weight",), WHOLE),
        Rule(
            mega + "mlp.linear_fc1.weight",
            (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"),
            GATE_UP,
        ),
        Rule(mega + "mlp.linear_fc2.weight", (hf + "mlp.down_proj.weight",), COLUMNS),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
        Rule("output_layer.weight", ("lm_head.weight",), VOCABULARY),
    )


_QKV_BIAS = Rule(
    "decoder.layers.{}.self_attention.linear_qkv.bias",
    tuple(f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in "qkv"),
    QKV,
)
_QK_NORM = tuple(
    Rule(
        f"decoder.layers.{{}}.self_attention.{name}_layernorm.weight",
        (f"model.layers.{{}}.self_attn.{name}_norm.weight",),
        WHOLE,
    )
    for name in "qk"
)

FAMILIES = {  # by `model_type` of config.json
    "qwen2": Family(_attention(_QKV_BIAS), qkv_bias=True),
    "qwen3": Family(_attention(*_QK_NORM), qk_norm=True),
    "llama": Family(_attention()),
}


def expand(rules: Sequence[Rule], layers: int) -> list[Rule]:
    """The rules with their layers filled in, layer by layer."""
    first = next(index for index, rule in enumerate(rules) if "{}" in rule.parameter)
    layered = [rule for rule in rules if "{}" in rule.parameter]
    before, after = rules[:first], rules[first + len(layered) :]
    return [*before, *(_filled(rule, layer) for layer in range(layers) for rule in layered), *after]


def _filled(rule: Rule, layer: int) -> Rule:
    tensors = tuple(name.format(layer) for name in rule.tensors)
    return Rule(rule.parameter.format(layer), tensors, rule.surgery)
