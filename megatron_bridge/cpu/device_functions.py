"""Runs Megatron-Core on a CPU: the CPU takes the place of every CUDA device that it names.

Import this module only if `torch.cuda.is_available()` is False. `install` replaces the functions of
`torch.cuda` that Megatron-Core calls directly. `CudaAsCpu` rewrites device arguments; enter it around every
call into Megatron-Core, because the mode belongs to a thread and a Ray actor's threads vary.
"""

import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CudaAsCpu(TorchFunctionMode):
    """Within it "cuda" means the CPU, and a tensor's type has the name that it would have on CUDA."""

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
    """Stands for every CUDA stream and event: on a CPU nothing is asynchronous."""

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
    """Replaces a function of the experts' token dispatcher, which makes numpy arrays of CUDA tensors only."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def install() -> None:
    """Replace the functions of `torch.cuda` that Megatron-Core calls. Calling it again changes nothing."""
    token_dispatcher.maybe_move_tensor_to_cpu = _as_moved_to_cpu  # type: ignore[assignment]  # a looser signature
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment]  # Megatron-Core only passes it on as a device
    torch.cuda.synchronize = _nothing
    torch.cuda.Stream = _Stream  # type: ignore[assignment]  # nothing is overlapped
    torch.cuda.stream = torch.cuda.current_stream = lambda *_: _Stream()  # type: ignore[assignment]  # likewise
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]  # nobody uses its result
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda._lazy_call = _nothing
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
