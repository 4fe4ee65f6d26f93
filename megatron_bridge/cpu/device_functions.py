"""Megatron-Core without CUDA: serve the CPU wherever it names the CUDA device.

Import this module only where `torch.cuda.is_available()` is False. `install` replaces the functions of
`torch.cuda` that Megatron-Core calls outright; `CudaAsCpu` rewrites device arguments and must be entered
around every call into Megatron-Core (the mode belongs to a thread, and an trainer's threads vary).
"""

import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CudaAsCpu(TorchFunctionMode):
    """Within it, "cuda" is the CPU, and a tensor's type name is the one that CUDA would give it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron-Core recognises dtypes by the names "torch.cuda.FloatTensor" and the like.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if not kwargs:
            return func(*args)
        device = kwargs.get("device")
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            kwargs = {**kwargs, "device": CPU}
        return func(*args, **kwargs)


class _Stream:
    """The one stream of a machine without any, and its events."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, *_: object) -> None: ...

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None: ...


def _nothing(*_: object, **__: object) -> None: ...


def _as_moved_to_cpu(tensor: object, as_numpy: bool = False, **_: object) -> object:
    """What the experts' token dispatcher makes of numbers that it fetches from the device: it asks first
    whether they are on one.
    """
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def install() -> None:
    """Replace what Megatron-Core calls in `torch.cuda`. May be called again."""
    token_dispatcher.maybe_move_tensor_to_cpu = _as_moved_to_cpu  # type: ignore[assignment]  # as typed loosely
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment]  # passed on as a device only
    torch.cuda.synchronize = _nothing
    torch.cuda.Stream = _Stream  # type: ignore[assignment]  # nothing is overlapped
    torch.cuda.stream = torch.cuda.current_stream = lambda *_: _Stream()  # type: ignore[assignment]  # likewise
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]  # its result is not used
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda._lazy_call = _nothing
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
