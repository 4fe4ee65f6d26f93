"""Turns Hugging Face tensors into Megatron-Core shards for tensor-parallel ranks and back, bit for bit.

Both directions are pure functions. Shards differ from slices of the Hugging Face tensors in three places: QKV
is interleaved by group, each rank has its rows of the gate and up projections together, and the vocabulary is
padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes by which a model's tensors are divided."""

    layers: int
    groups: int  # key-value heads
    head_dim: int
    vocabulary: int
    experts: int = 0  # of each sparse layer
    sparse_layers: tuple[int, ...] = ()  # counted from 0; they have experts in place of the MLP


Split = Callable[[Sequence[Tensor], int, Dimensions], list[Tensor]]
Join = Callable[[Sequence[Tensor], Dimensions], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Surgery:
    """split: from the Hugging Face tensors of one Megatron parameter to a shard for each rank. join: from the
    shards back to the tensors.

    replicated: every rank holds the same tensor, so one shard suffices to join. stacked: the shards are the
    rows of one tensor and may be joined as that tensor, so that a large one is never held twice.
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
    """A rank has its rows of the gate, then its rows of the up projection."""
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
ROWS = Surgery(
    lambda tensors, ranks, _: list(tensors[0].chunk(ranks)),
    lambda shards, _: [torch.cat(list(shards))],
)
QKV = Surgery(_split_qkv, _join_qkv)
GATE_UP = Surgery(_split_gate_up, _join_gate_up)
VOCABULARY = Surgery(_split_vocabulary, _join_vocabulary, stacked=True)
