"""Causal attention over tokens scattered in a KV pool, many requests in one call, in plain torch.

Requests with one new token and similar lengths are padded together, so a decoding step takes a few calls,
regardless of the number of requests. A request with several new tokens gets a call of its own, whose queries
are the new tokens alone, regardless of the length of their prefix.

A slot is one token's place in the KV pool. Dimensions: B requests in one padded call, K tokens of a request
(its keys), Q new tokens of a request (its queries).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_GROUP_BYTES = 1 << 20
"""Bytes of one group's keys, padding included. Larger copies leave a core's cache and cost three times as
much per token.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Requests with one new token each.

    rows: int64 [B], each request's row in the batch's queries.
    slots: int64 [B, K], slots of each request's tokens; a shorter request repeats its first.
    mask: [B, 1, 1, K], 0 on a request's own tokens, -inf on padding.
    """

    rows: Tensor
    slots: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """One request with several new tokens.

    rows: its rows in the batch's queries. slots: int64 [K]. mask: [Q, K]; None if all tokens are new.
    """

    rows: slice
    slots: Tensor
    mask: Tensor | None


def plan(
    new: Sequence[int], total: Sequence[int], slots: Tensor, token_bytes: int, dtype: torch.dtype
) -> list[Steps | Chunk]:
    """Plan the calls for a batch. Request i has `total[i]` tokens; its last `new[i]` are consecutive queries.

    slots: int [requests, at least max(total)], each request's slots in the order of its tokens. token_bytes:
    size of one token's keys. dtype: of the masks.
    """
    first = [end - count for end, count in zip(_running_sum(new), new, strict=True)]
    calls: list[Steps | Chunk] = []
    steps = []
    for request, (start, count, length) in enumerate(zip(first, new, total, strict=True)):
        if count == 1:
            steps.append(request)
        else:
            rows = slice(start, start + count)
            calls.append(Chunk(rows, slots[request, :length].long(), _causal_mask(count, length, dtype)))
    first_rows, totals = torch.tensor(first), torch.tensor(total)
    for group in _similar(steps, total, max(1, _GROUP_BYTES // token_bytes)):
        members = torch.tensor(group)
        padding_BK = torch.arange(total[group[-1]]) >= totals[members, None]
        slots_BK = slots[members, : padding_BK.shape[1]].long()
        slots_BK = torch.where(padding_BK, slots_BK[:, :1], slots_BK)
        mask_BK = torch.zeros(padding_BK.shape, dtype=dtype).masked_fill_(padding_BK, float("-inf"))
        calls.append(Steps(first_rows[members], slots_BK, mask_BK[:, None, None]))
    return calls


def _running_sum(counts: Sequence[int]) -> list[int]:
    return torch.tensor(counts).cumsum(0).tolist()


def _causal_mask(count: int, length: int, dtype: torch.dtype) -> Tensor | None:
    if count == length:
        return None
    hidden_QK = torch.ones(count, length, dtype=torch.bool).triu_(length - count + 1)
    return torch.zeros(count, length, dtype=dtype).masked_fill_(hidden_QK, float("-inf"))


def _similar(requests: list[int], total: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Group requests of similar lengths: at most `capacity` tokens (or one request), at most half of
    them padding.
    """
    group: list[int] = []
    for request in sorted(requests, key=total.__getitem__):
        if group and ((len(group) + 1) * total[request] > capacity or total[request] > 2 * total[group[0]]):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def attend(
    calls: Sequence[Steps | Chunk], query: Tensor, keys: Tensor, values: Tensor, scale: float, output: Tensor
) -> None:
    """Write causal attention with grouped queries into `output`.

    query, output: [rows, heads, head_dim]. keys, values: [slots, kv_heads, head_dim]; consecutive query heads
    share a key head.
    """
    for call in calls:
        if isinstance(call, Steps):
            _attend_steps(call, query, keys, values, scale, output)
        else:
            _attend_chunk(call, query, keys, values, scale, output)


def _attend_steps(
    steps: Steps, query: Tensor, keys: Tensor, values: Tensor, scale: float, output: Tensor
) -> None:
    size, length = steps.slots.shape
    heads, width = query.shape[1:]
    kv_heads = keys.shape[1]
    slots = steps.slots.flatten()
    # The heads that share a key head take the place of queries, so the keys are read once instead of
    # repeated.
    attended = scaled_dot_product_attention(
        query[steps.rows].view(size, kv_heads, heads // kv_heads, width),
        keys.index_select(0, slots).view(size, length, kv_heads, width).transpose(1, 2),
        values.index_select(0, slots).view(size, length, kv_heads, width).transpose(1, 2),
        attn_mask=steps.mask,
        scale=scale,
    )
    output[steps.rows] = attended.reshape(size, heads, width)


def _attend_chunk(
    chunk: Chunk, query: Tensor, keys: Tensor, values: Tensor, scale: float, output: Tensor
) -> None:
    heads, width = query.shape[1:]
    kv_heads = keys.shape[1]
    share = heads // kv_heads

    def for_each_head(pool: Tensor) -> Tensor:
        """[kv_heads, share, K, width]; the heads that share a key head are one in memory."""
        return pool.index_select(0, chunk.slots).transpose(0, 1)[:, None].expand(-1, share, -1, -1)

    new = query[chunk.rows]
    attended = scaled_dot_product_attention(
        new.view(len(new), kv_heads, share, width).permute(1, 2, 0, 3),
        for_each_head(keys),
        for_each_head(values),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
    )
    output[chunk.rows] = attended.permute(2, 0, 1, 3).reshape(len(new), heads, width)
