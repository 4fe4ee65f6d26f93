"""SGLang's attention backend for the CPU platform.

The torch-native backend attends one request at a time, and one whose prefix is cached as if all of it were
new; see padded_attention.py for what is done instead.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from sglang_rollout.cpu.padded_attention import Chunk, Steps, attend, plan


class CpuAttention(TorchNativeAttnBackend):
    """Plain causal self-attention as above; every other kind of layer as in the torch-native backend."""

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
