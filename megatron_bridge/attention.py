"""Tree attention: token i of a depth-first pack attends to token j iff j <= i < exit[j].

A plan is made once per micro-batch from `exit` and `position`. Every layer of every pipeline stage uses it,
and so does recomputation. It travels as Megatron-Core's `attention_bias`, which reaches the core attention
untouched: a plan is a bias of 0 and -inf in factored form.

Both kinds of plan divide the queries into blocks of consecutive tokens. The keys of the block [a, b) are the
block itself and the tokens above a (j < a < exit[j]). These suffice: any ancestor j < a of a query i >= a has
exit[j] > i >= a, so it is above a too. The cost therefore follows the pairs that the mask allows, not T^2,
whatever the lengths of the segments.

Context parallelism: a rank has the queries of its slice of the pack (treepo.learning.slicing). In every layer
it gathers the rotated keys and the values of all slices; the backward pass scatters the sums of their
gradients. The mask is the same, by the tokens' places in the whole pack. The heads are computed in two parts:
the keys and values of one part travel while the other's attention is computed.

Why not a ring: with grouped queries a token's keys and values are small (Qwen3-8B: 4 KiB a layer, and 8 KiB
of residual stream), and one gather sends the same bytes in one message. A ring would hold fewer slices while
one layer computes, but needs a mask for each pair of slices, and merges partial softmaxes. What is gathered
stays until the backward pass only with `trainer.recompute: none`; otherwise it is gathered again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_bridge.context_exchange import gathered
from megatron_bridge.fusion import compiled
from megatron_bridge.rotary import cos_sin, rotate, rotated
from megatron_bridge.routing_replay import Routes

CPU_BLOCK = 64  # queries in a block on CPU; 32 and 128 are as fast on short segments
CUDA_BLOCK = 128  # FlexAttention's own
PARTS = 2  # in which a context-parallel rank computes its heads; more would hide more, in smaller kernels
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
class Slices:
    """A pack of T tokens divided among the ranks of a context group. On CUDA a slice consists of whole
    CUDA_BLOCKs of consecutive tokens.

    own: int64 [T / ranks], this rank's tokens, ascending. gathered: int64 [T], all tokens, slice by slice in
    the order of the group's ranks.
    """

    own: Tensor
    gathered: Tensor
    group: ProcessGroup


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What the core attention of every layer needs for this rank's T tokens of a micro-batch, and the experts
    that its router is given. group: the ranks that have the others; None if there are none.
    """

    cos: Tensor  # float32 [T, 1, head_dim / 2]
    sin: Tensor
    mask: GatherPlan | BlockMask
    routes: Routes | None = None
    group: ProcessGroup | None = None


def plan_attention(
    exit_T: Tensor,
    position_T: Tensor,
    frequency: Tensor,
    dtype: torch.dtype,
    slices: Slices | None = None,
) -> AttentionPlan:
    """Make the plan of one pack, or of this rank's slice of it, on the device that holds these tensors.
    frequency: the model's `rotary.inverse_frequency`. dtype: of queries and keys.
    """
    cos, sin = cos_sin(position_T if slices is None else position_T[slices.own], frequency)
    group = None if slices is None else slices.group
    if exit_T.is_cuda:
        return AttentionPlan(cos, sin, block_mask(exit_T, slices), group=group)
    return AttentionPlan(cos, sin, gather_plan(exit_T.numpy(), dtype, slices), group=group)


def gather_plan(exit_T: np.ndarray, dtype: torch.dtype, slices: Slices | None = None) -> GatherPlan:
    """Gather indices and biases of every query block, grouped by the number of keys."""
    own = place = np.arange(len(exit_T))
    if slices is not None:
        own, place = slices.own.numpy(), np.argsort(slices.gathered.numpy())
    queries = np.split(own, range(CPU_BLOCK, len(own), CPU_BLOCK))
    keys = [_keys(exit_T, block) for block in queries]
    by_size = sorted(range(len(keys)), key=lambda block: len(keys[block]), reverse=True)
    members: list[list[int]] = []
    for block in by_size:
        if not members or len(keys[block]) < GROUP_SHARE * len(keys[members[-1][0]]):
            members.append([])
        members[-1].append(block)
    groups = tuple(_group(blocks, queries, keys, exit_T, place, dtype) for blocks in members)
    return GatherPlan(groups, torch.from_numpy(np.argsort(by_size)))


def _keys(exit_T: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The keys of a block of queries, which may consist of several runs of consecutive tokens."""
    needed = np.zeros(len(exit_T), dtype=bool)
    for run in np.split(query, np.flatnonzero(np.diff(query) > 1) + 1):
        needed[: run[0]] |= exit_T[: run[0]] > run[0]
        needed[run] = True
    return np.flatnonzero(needed)


def _group(
    blocks: list[int],
    queries: list[np.ndarray],
    keys: list[np.ndarray],
    exit_T: np.ndarray,
    place: np.ndarray,
    dtype: torch.dtype,
) -> BlockGroup:
    """Pad every block's keys to the longest. A query past the end of the slice gets one key, because an empty
    row has no softmax. place: int64 [T], where each token is among the keys.
    """
    length = len(exit_T)
    key = np.full((len(blocks), max(len(keys[block]) for block in blocks)), length)
    query = np.full((len(blocks), CPU_BLOCK), -1)
    for block, key_row, query_row in zip(blocks, key, query, strict=True):
        key_row[: len(keys[block])] = keys[block]
        query_row[: len(queries[block])] = queries[block]
    key, query = key[:, None, :], query[:, :, None]
    allowed = (key <= query) & (query < np.append(exit_T, 0)[key])
    allowed[:, :, 0] |= ~allowed.any(axis=2)
    bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~torch.from_numpy(allowed), -torch.inf)
    index = place[np.minimum(key, length - 1).reshape(-1)]
    return BlockGroup(torch.tensor(blocks), torch.from_numpy(index), bias[:, None])


def attend_gathered(query: Tensor, key_value: Tensor, plan: GatherPlan) -> Tensor:
    """Attention on CPU. query: [T, heads, D]; key_value: keys beside values, [all T, groups, 2 D]. Returns
    [T, heads, D].
    """
    length, heads, head_dim = query.shape
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


def block_mask(exit_T: Tensor, slices: Slices | None = None) -> BlockMask:
    """FlexAttention's mask, made from `exit` alone; it is [blocks, blocks] and never [T, T]. With slices, of
    this rank's queries and the gathered keys.

    A block of queries and an earlier block of keys have an allowed pair if the keys' largest exit lies beyond
    the queries' start, and only allowed pairs if their smallest exit lies beyond the queries' end. The tokens
    are padded to whole blocks; a padding token sees itself alone.
    """
    length, rest = len(exit_T), -len(exit_T) % CUDA_BLOCK
    padding = torch.arange(length + 1, length + rest + 1, dtype=exit_T.dtype, device=exit_T.device)
    exits = torch.cat([exit_T, padding])
    if slices is None:
        query_start = key_start = torch.arange(0, len(exits), CUDA_BLOCK, device=exit_T.device)
    else:
        assert not rest, "slices are of whole blocks"
        query_start, key_start = slices.own[::CUDA_BLOCK], slices.gathered[::CUDA_BLOCK]
        exits = exits[slices.gathered]
    block_exits = exits.view(-1, CUDA_BLOCK)
    earlier = key_start[None, :] < query_start[:, None]  # [query block, key block]
    same = key_start[None, :] == query_start[:, None]
    some = same | (earlier & (block_exits.amax(1)[None, :] > query_start[:, None]))
    full = earlier & (block_exits.amin(1)[None, :] >= query_start[:, None] + CUDA_BLOCK)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~full),
        *_ordered(full),
        BLOCK_SIZE=CUDA_BLOCK,
        mask_mod=_mask(exits, slices),
        seq_lengths=(len(query_start) * CUDA_BLOCK, len(exits)),
    )


def _mask(exits: Tensor, slices: Slices | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query may attend to a key, by their indices. exits: of the keys."""

    def of_whole_pack(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < exits[key])

    if slices is None:
        return of_whole_pack
    own, gathered = slices.own, slices.gathered

    def of_slice(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (gathered[key] <= own[query]) & (own[query] < exits[key])

    return of_slice


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """List the chosen key blocks of each query block.

    blocks: bool [queries, keys]. Returns counts [1, 1, queries] and indices [1, 1, queries, keys], chosen
    ones first.
    """
    chosen = blocks[None, None].to(torch.int32)
    index = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), index.to(torch.int32)


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask
) -> Tensor:
    """The compiled part: [blocks, CUDA_BLOCK, heads or groups, D] to [blocks, CUDA_BLOCK, heads, D].

    The caller divides the tokens into blocks, so that the compiler knows a variable length to be a multiple
    of CUDA_BLOCK. Only then do the kernels omit the bounds checks. Rotation and copies become one kernel for
    each of query, key and value.
    """
    return attend_rotated_blocks(rotated(query, cos, sin), rotated(key, cos, sin), value, mask)


def attend_rotated_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """`attend_blocks` of queries and keys that are rotated; there may be more keys than queries.

    Every query head gets its own copy of its group's keys and values. With `enable_gqa` one program of the
    backward kernel loops over all heads of a group, which more than doubled its share of a train step; the
    likely reason is the root of a tree, which all tokens attend to (docs/performance.md, On a GPU).
    """
    heads_per_group = query.shape[2] // key.shape[2]
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


def _compiled(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Compiled in any case: FlexAttention without compilation would make a T x T matrix.
    return compiled(attend)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """Rotate by position, then attend along the tree. query: [T, heads, D]; key and value: [T, groups, D].
    Returns [T, heads, D].
    """
    if plan.group is None and isinstance(plan.mask, BlockMask):
        blocks = (_in_blocks(x) for x in (query, key, value, plan.cos, plan.sin))
        return _compiled(attend_blocks)(*blocks, plan.mask).flatten(0, 1)[: len(query)]
    query, key = rotate(query, plan.cos, plan.sin), rotate(key, plan.cos, plan.sin)
    key_value = torch.cat([key, value], dim=-1)
    if plan.group is None:
        return _attend_rotated(query, key_value, plan.mask)
    heads_per_group = query.shape[1] // key.shape[1]
    parts = key_value.tensor_split(min(PARTS, key.shape[1]), dim=1)
    queries = query.split([heads_per_group * part.shape[1] for part in parts], dim=1)
    wholes = zip(queries, gathered(parts, plan.group), strict=True)
    return torch.cat([_attend_rotated(query, whole, plan.mask) for query, whole in wholes], dim=1)


def _attend_rotated(query: Tensor, key_value: Tensor, mask: GatherPlan | BlockMask) -> Tensor:
    """query: [T, heads, D]; key_value: keys beside values, [all T, groups, 2 D]. Returns [T, heads, D]."""
    if isinstance(mask, GatherPlan):
        return attend_gathered(query, key_value, mask)
    blocks = (_in_blocks(x) for x in (query, *key_value.chunk(2, dim=-1)))
    return _compiled(attend_rotated_blocks)(*blocks, mask).flatten(0, 1)
