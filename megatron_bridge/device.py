"""Where Megatron-Core's CUDA calls go."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device() -> AbstractContextManager:
    """To be entered around Megatron-Core: without CUDA, its CUDA calls are served by the CPU."""
    if torch.cuda.is_available():
        return nullcontext()
    from megatron_bridge.cpu import (
        device_functions,  # it replaces functions of torch.cuda: not where there is CUDA
    )

    device_functions.install()
    return device_functions.CudaAsCpu()
