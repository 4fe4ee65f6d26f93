"""The KV allocator of the CPU platform: pages of one token."""

import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import KVCache


class TokenAllocator(TokenToKVPoolAllocator):
    """SGLang hands every out-of-tree allocator a page size; its token allocator takes none."""

    def __init__(
        self, size: int, page_size: int, dtype: torch.dtype, device: str, kvcache: KVCache, need_sort: bool
    ) -> None:
        if page_size != 1:
            raise ValueError(f"the CPU platform has pages of one token; page_size = {page_size} is not 1")
        super().__init__(size, dtype=dtype, device=device, kvcache=kvcache, need_sort=need_sort)
