"""Where Megatron-Core's CUDA calls go."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device() -> AbstractContextManager:
    """To be entered around Megatron-Core: without CUDA, its CUDA calls are served by the CPU."""
    if torch.cuda.is_available():
        return nullcontext()
    from megatron_bridge import cpu  # it replaces functions of torch.cuda: not where there is CUDA

    cpu.install()
    return cpu.CudaAsCpu()
