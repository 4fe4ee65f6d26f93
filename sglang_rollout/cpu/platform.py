"""Implements SGLang's out-of-tree platform interface for the CPU.

SGLang asks for the platform while its own modules are still loading, so its pool classes and our replacements
are imported inside the methods.
"""

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def gloo_only(*arguments: Any, **keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook before `GroupCoordinator.__init__`: build gloo groups alone.

    SGLang builds NCCL communicators if it finds NCCL's library, which PyTorch's CUDA build also installs on
    machines without a GPU.
    """
    return arguments, keywords | {"use_pynccl": False, "use_custom_allreduce": False}


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # pyright: ignore[reportIncompatibleMethodOverride] - SGLang's own
    """Torch-native operations, plain KV pools, pages of one token."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def init_backend(self) -> None:
        """Replace SGLang's torch-native attention and sampler by ours.

        They keep the old names, because by these SGLang chooses torch code over Triton kernels elsewhere.
        """
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.layers.sampler import register_sampler_backend
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        from sglang_rollout.cpu.replacements import (
            CpuAttention,
            SeededSampler,
            add_seeds,
            add_shared_expert,
            make_host_cache,
            own_experts,
        )

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
        HookRegistry.register(
            "sglang.kernels.ops.layernorm.elementwise.fused_gate_sigmoid_mul_add",
            add_shared_expert,
            HookType.REPLACE,
        )
        HookRegistry.register(
            "sglang.srt.layers.moe.fused_moe_native.moe_forward_native", own_experts, HookType.AROUND
        )
        HookRegistry.register(
            "sglang.srt.state_capturer.base.BaseHostCache.__init__", make_host_cache, HookType.REPLACE
        )
        HookRegistry.apply_hooks()  # SGLang may have made its own call already; applied hooks stay

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return MLATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang_rollout.cpu.replacements import TokenAllocator

        return TokenAllocator

    def empty_cache(self) -> None:
        """Do nothing: host memory is free once it has no reference.

        SGLang's own collects garbage, which takes half a second of every weight sync.
        """

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:  # noqa: ARG002 - SGLang's signature
        return False
