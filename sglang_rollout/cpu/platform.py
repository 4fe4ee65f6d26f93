"""SGLang's out-of-tree platform interface, filled in for the CPU.

SGLang's pool classes are imported inside the methods: SGLang asks for the platform while the modules that
define them still load.
"""

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # pyright: ignore[reportIncompatibleMethodOverride] - SGLang's own
    """Torch-native operations, plain KV pools, pages of one token."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def init_backend(self) -> None:
        """Put our attention and our sampler in the places of SGLang's torch-native ones.

        Under the old names: SGLang chooses torch code over Triton kernels elsewhere by the name.
        """
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.layers.sampler import register_sampler_backend
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        from sglang_rollout.cpu.attention import CpuAttention
        from sglang_rollout.cpu.groups import gloo_only
        from sglang_rollout.cpu.sampler import SeededSampler, add_seeds

        register_attention_backend("torch_native")(CpuAttention)
        register_sampler_backend("pytorch", SeededSampler)
        HookRegistry.register(
            "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
            add_seeds,
            HookType.AFTER,
        )
        HookRegistry.register(
            "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__", gloo_only, HookType.BEFORE
        )
        HookRegistry.apply_hooks()  # SGLang's own call may be behind us; hooks that are in place stay

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return MLATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang_rollout.cpu.allocator import TokenAllocator

        return TokenAllocator

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:  # noqa: ARG002 - SGLang's signature
        return False
