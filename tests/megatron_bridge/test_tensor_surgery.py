"""Tensor surgery: shards have the rows that Megatron-Core's layout puts on each rank."""

import torch

from megatron_bridge.tensor_surgery import GATE_UP, QKV, VOCABULARY, Dimensions, padded_vocabulary


def test_qkv_is_interleaved_by_group() -> None:
    """Two groups of two query heads, one row each: q0 q1 k0 v0 on one rank, q2 q3 k1 v1 on the other."""
    query, key, value = torch.arange(4)[:, None], torch.tensor([[10], [11]]), torch.tensor([[20], [21]])
    first, second = QKV.split([query, key, value], 2, Dimensions(1, 2, 1, 0))
    assert first.flatten().tolist() == [0, 1, 10, 20]
    assert second.flatten().tolist() == [2, 3, 11, 21]


def test_every_rank_has_its_rows_of_gate_and_up() -> None:
    gate, up = torch.arange(4)[:, None], torch.arange(10, 14)[:, None]
    first, second = GATE_UP.split([gate, up], 2, Dimensions(1, 1, 1, 0))
    assert first.flatten().tolist() == [0, 1, 10, 11]
    assert second.flatten().tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zeros() -> None:
    table = torch.arange(1, 6)[:, None]
    shards = VOCABULARY.split([table], 4, Dimensions(1, 1, 1, vocabulary=5))
    assert torch.cat(shards).flatten().tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert padded_vocabulary(8, 4) == 8
