"""What replaces SGLang's own on the CPU platform: attention, sampler, experts, KV allocator.

They subclass SGLang's, so this module can be imported only after SGLang has loaded; `platform` registers
them. The arithmetic is in `padded_attention` and `seeded_draw`, without SGLang.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.layers.sampler import Sampler
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import KVCache, KVWriteLoc
from torch import Tensor

from sglang_rollout.cpu.padded_attention import Chunk, Steps, attend, plan
from sglang_rollout.cpu.seeded_draw import invert, truncate, uniform


class CpuAttention(TorchNativeAttnBackend):
    """Plain causal self-attention in padded batches; every other kind of layer as in the torch-native
    backend.

    The torch-native backend attends one request at a time, and computes a cached prefix as if it were new.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._dtype: torch.dtype = runner.dtype
        self._pool: Any = runner.token_to_kv_pool
        self._slots: Any = runner.req_to_token_pool
        self._calls: list[Steps | Chunk] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan the calls, once for all layers."""
        super().init_forward_metadata(forward_batch)
        total = forward_batch.seq_lens.tolist()
        decoding = forward_batch.forward_mode.is_decode()
        new = [1] * len(total) if decoding else forward_batch.extend_seq_lens.tolist()
        slots = self._slots.req_to_token[forward_batch.req_pool_indices, : max(total, default=0)]
        keys = self._pool.get_key_buffer(self._pool.start_layer)
        self._calls = plan(new, total, slots, keys[0].nbytes, self._dtype)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        if not _is_plain(layer, self.use_sliding_window_kv_pool):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        if not _is_plain(layer, self.use_sliding_window_kv_pool):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> Tensor:
        if save_kv_cache:
            self._pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = torch.empty_like(query)
        attend(
            self._calls,
            query,
            self._pool.get_key_buffer(layer.layer_id),
            self._pool.get_value_buffer(layer.layer_id),
            layer.scaling,
            output,
        )
        return output.view(len(output), -1)


def _is_plain(layer: Any, sliding_window_pool: bool) -> bool:
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.qk_head_dim == layer.v_head_dim
        and not sliding_window_pool
        and (layer.sliding_window_size is None or layer.sliding_window_size < 0)
    )


class SeededSampler(Sampler):
    """SGLang's sampler, with seeded draws.

    SGLang samples reproducibly only in its deterministic mode, whose kernels are for GPUs. Here each token is
    drawn by inverting the cumulative distribution at a uniform number that depends only on the request's seed
    and the token's position. So a request gives the same tokens in any batch, unless rounding, which depends
    on the size of the batch, moves a probability across that number.
    """

    def _sample_from_probs(
        self, probs: Tensor, sampling_info: Any, positions: Tensor, simple_sampling_case: bool
    ) -> Tensor:
        if not simple_sampling_case:
            probs = truncate(probs, sampling_info.top_ks, sampling_info.top_ps, sampling_info.min_ps)
        number = uniform(sampling_info.sampling_seed.numpy(), positions.numpy())
        return invert(probs, torch.from_numpy(number))


def add_seeds(info: Any, _class: type, batch: Any, _vocab_size: int) -> None:
    """Hook after `SamplingBatchInfo.from_schedule_batch`, which keeps seeds in deterministic mode only."""
    seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64)


def add_shared_expert(hidden: Tensor, gate: Tensor, shared: Tensor, output: Tensor) -> None:
    """Add `shared`, times the sigmoid of its gate, to `output`; SGLang's own is a Triton kernel.

    hidden, shared, output: [T, hidden]; gate: [hidden].
    """
    output.addcmul_((hidden @ gate).sigmoid()[:, None], shared)


def own_experts(compute: Any, layer: Any, hidden: Tensor, choice: Any, config: Any) -> Tensor:
    """Wraps `moe_forward_native`, which cannot skip the experts of other ranks; their number is -1 here.

    hidden, result: [T, hidden]. choice: experts and their weights, [T, k] each. It computes each pair of a
    token and an expert of this rank as a token with one choice; the ranks' results are summed later.
    """
    if layer.moe_ep_size == 1:
        return compute(layer, hidden, choice, config)
    token, place = (choice.topk_ids >= 0).nonzero(as_tuple=True)
    output = torch.zeros_like(hidden)
    if len(token):
        one = choice._replace(
            topk_ids=choice.topk_ids[token, place, None],
            topk_weights=choice.topk_weights[token, place, None],
        )
        output.index_add_(0, token, compute(layer, hidden[token], one, config))
    return output


def make_host_cache(cache: Any, num_tokens: int, num_layers: int, topk_size: int, name: str) -> None:
    """The record of experts for each KV slot: SGLang's own pins its memory for copies from a GPU."""
    cache.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
    cache.num_tokens, cache.num_layers, cache.topk_size = num_tokens, num_layers, topk_size
    cache.name = name


class TokenAllocator(TokenToKVPoolAllocator):
    """The KV allocator with pages of one token. SGLang gives every out-of-tree allocator a page size; its own
    token allocator takes none.
    """

    def __init__(
        self, size: int, page_size: int, dtype: torch.dtype, device: str, kvcache: KVCache, need_sort: bool
    ) -> None:
        if page_size != 1:
            raise ValueError(f"page_size = {page_size}: the CPU platform has pages of one token")
        super().__init__(size, dtype=dtype, device=device, kvcache=kvcache, need_sort=need_sort)
