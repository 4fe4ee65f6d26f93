"""Tree attention: token i of a depth-first pack attends to token j iff j <= i < exit[j].

A plan is made once per micro-batch from `exit` and `position`. Every layer of every pipeline stage uses it,
and so does recomputation. It travels as Megatron-Core's `attention_bias`, which reaches the core attention
untouched: a plan is a bias of 0 and -inf in factored form.

Both kinds of plan divide the queries into blocks of consecutive tokens. The keys of the block [a, b) are the
block itself and the tokens above a (j < a < exit[j]). These suffice: any ancestor j < a of a query i >= a has
exit[j] > i >= a, so it is above a too. The cost therefore follows the pairs that the mask allows, not T^2,
whatever the lengths of the segments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_bridge.fusion import compiled
from megatron_bridge.rotary import cos_sin, rotate, rotated
from megatron_bridge.routing_replay import Routes

CPU_BLOCK = 64  # queries in a block on CPU; 32 and 128 are as fast on short segments
CUDA_BLOCK = 128  # FlexAttention's own
GROUP_SHARE = 0.75  # a group's shortest block has at least this share of its longest block's keys


@dataclass(frozen=True, slots=True, eq=False)
class BlockGroup:
    """Query blocks with about equally many keys, computed in one call.

    key: int64 [blocks * keys], token indices, block by block. bias: [blocks, 1, CPU_BLOCK, keys], 0 or -inf.
    """

    block: Tensor  # int64 [blocks], indices of the query blocks
    key: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GatherPlan:
    """The CPU's plan. order: int64 [blocks], the place of each block in the groups' concatenated output."""

    groups: tuple[BlockGroup, ...]
    order: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What the core attention of every layer needs for a micro-batch of T tokens, and the experts that its
    router is given.
    """

    cos: Tensor  # float32 [T, 1, head_dim / 2]
    sin: Tensor
    mask: GatherPlan | BlockMask
    routes: Routes | None = None


def plan_attention(
    exit_T: Tensor, position_T: Tensor, frequency: Tensor, dtype: torch.dtype
) -> AttentionPlan:
    """Make the plan of one pack on the device that holds these tensors. frequency: the model's
    `rotary.inverse_frequency`. dtype: of queries and keys.
    """
    cos, sin = cos_sin(position_T, frequency)
    if exit_T.is_cuda:
        return AttentionPlan(cos, sin, block_mask(exit_T))
    return AttentionPlan(cos, sin, gather_plan(exit_T.numpy(), dtype))


def gather_plan(exit_T: np.ndarray, dtype: torch.dtype) -> GatherPlan:
    """Gather indices and biases of every query block, grouped by the number of keys."""
    length = len(exit_T)
    keys = []
    for start in range(0, length, CPU_BLOCK):
        above = np.flatnonzero(exit_T[:start] > start)
        keys.append(np.concatenate([above, np.arange(start, min(start + CPU_BLOCK, length))]))
    by_size = sorted(range(len(keys)), key=lambda block: len(keys[block]), reverse=True)
    members: list[list[int]] = []
    for block in by_size:
        if not members or len(keys[block]) < GROUP_SHARE * len(keys[members[-1][0]]):
            members.append([])
        members[-1].append(block)
    groups = tuple(_group(blocks, [keys[block] for block in blocks], exit_T, dtype) for blocks in members)
    return GatherPlan(groups, torch.from_numpy(np.argsort(by_size)))


def _group(blocks: list[int], keys: list[np.ndarray], exit_T: np.ndarray, dtype: torch.dtype) -> BlockGroup:
    """Pad every block's keys to the longest. A query past the end of the pack gets one key, because an empty
    row has no softmax.
    """
    length = len(exit_T)
    key = np.full((len(blocks), max(map(len, keys))), length)
    for row, tokens in zip(key, keys, strict=True):
        row[: len(tokens)] = tokens
    key = key[:, None, :]
    query = (np.array(blocks)[:, None] * CPU_BLOCK + np.arange(CPU_BLOCK))[:, :, None]
    allowed = (key <= query) & (query < np.append(exit_T, 0)[key])
    allowed[:, :, 0] |= ~allowed.any(axis=2)
    bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~torch.from_numpy(allowed), -torch.inf)
    return BlockGroup(
        torch.tensor(blocks), torch.from_numpy(np.minimum(key, length - 1).reshape(-1)), bias[:, None]
    )


def attend_gathered(query: Tensor, key: Tensor, value: Tensor, plan: GatherPlan) -> Tensor:
    """Attention on CPU. query: [T, heads, D]; key and value: [T, groups, D]. Returns [T, heads, D]."""
    length, heads, head_dim = query.shape
    key_value = torch.cat([key, value], dim=-1)
    query = pad(query, (0, 0, 0, 0, 0, -length % CPU_BLOCK)).view(-1, CPU_BLOCK, heads, head_dim)
    outputs = []
    for group in plan.groups:
        count = len(group.block)
        gathered = key_value.index_select(0, group.key).view(count, -1, *key_value.shape[1:])
        block_key, block_value = gathered.transpose(1, 2).chunk(2, dim=-1)
        block_query = query.index_select(0, group.block).transpose(1, 2)
        output = scaled_dot_product_attention(
            block_query, block_key, block_value, attn_mask=group.bias, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs).index_select(0, plan.order).reshape(-1, heads, head_dim)[:length]


def block_mask(exit_T: Tensor) -> BlockMask:
    """FlexAttention's mask, made from `exit` alone; it is [blocks, blocks] and never [T, T].

    A block of queries and an earlier block of keys have an allowed pair if the keys' largest exit lies beyond
    the queries' start, and only allowed pairs if their smallest exit lies beyond the queries' end. The tokens
    are padded to whole blocks; a padding token sees itself alone.
    """
    length, rest = len(exit_T), -len(exit_T) % CUDA_BLOCK
    padding = torch.arange(length + 1, length + rest + 1, dtype=exit_T.dtype, device=exit_T.device)
    exits = torch.cat([exit_T, padding])
    block_exits = exits.view(-1, CUDA_BLOCK)
    start = torch.arange(0, len(exits), CUDA_BLOCK, device=exit_T.device)
    earlier = start[None, :] < start[:, None]  # [query block, key block]
    some = (earlier & (block_exits.amax(1)[None, :] > start[:, None])) | torch.eye(
        len(start), dtype=torch.bool, device=exit_T.device
    )
    full = earlier & (block_exits.amin(1)[None, :] >= start[:, None] + CUDA_BLOCK)

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < exits[key])

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~full),
        *_ordered(full),
        BLOCK_SIZE=CUDA_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(len(exits), len(exits)),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """List the chosen key blocks of each query block.

    blocks: bool [queries, keys]. Returns counts [1, 1, queries] and indices [1, 1, queries, keys], chosen
    ones first.
    """
    chosen = blocks[None, None].to(torch.int32)
    index = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), index.to(torch.int32)


def attend_sparse(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """Rotation and attention by FlexAttention. query: [T, heads, D]; key and value: [T, groups, D]. Returns
    [T, heads, D].
    """
    blocks = (_in_blocks(x) for x in (query, key, value, plan.cos, plan.sin))
    return _compiled_attend_blocks()(*blocks, plan.mask).flatten(0, 1)[: len(query)]


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask
) -> Tensor:
    """The compiled part: [blocks, CUDA_BLOCK, heads or groups, D] to [blocks, CUDA_BLOCK, heads, D].

    The caller divides the tokens into blocks, so that the compiler knows a variable length to be a multiple
    of CUDA_BLOCK. Only then do the kernels omit the bounds checks. Rotation and copies become one kernel for
    each of query, key and value.

    Every query head gets its own copy of its group's keys and values. With `enable_gqa` one program of the
    backward kernel loops over all heads of a group, which more than doubled its share of a train step; the
    likely reason is the root of a tree, which all tokens attend to (docs/performance.md, On a GPU).
    """
    heads_per_group = query.shape[2] // key.shape[2]
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    query, key, value = (x.flatten(0, 1).transpose(0, 1)[None] for x in (query, key, value))
    key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))
    output = flex_attention(query, key, value, block_mask=mask)
    return output[0].transpose(0, 1).unflatten(0, (-1, CUDA_BLOCK))  # type: ignore[union-attr]  # no aux asked for


def _in_blocks(x: Tensor) -> Tensor:
    """[T, ...] to [blocks, CUDA_BLOCK, ...], padded with 0.

    Without padding it is a view. The strides that a model gives it do not depend on T, so they are compiled
    for once.
    """
    rest = -len(x) % CUDA_BLOCK
    x = pad(x, (0, 0, 0, 0, 0, rest)) if rest else x
    return x.unflatten(0, (-1, CUDA_BLOCK))


def _compiled_attend_blocks() -> Callable[..., Tensor]:
    # Compiled in any case: FlexAttention without compilation would make a T x T matrix.
    return compiled(attend_blocks)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """Rotate by position, then attend along the tree. query: [T, heads, D]; key and value: [T, groups, D].
    Returns [T, heads, D].
    """
    if isinstance(plan.mask, BlockMask):
        return attend_sparse(query, key, value, plan)
    query, key = rotate(query, plan.cos, plan.sin), rotate(key, plan.cos, plan.sin)
    return attend_gathered(query, key, value, plan.mask)
