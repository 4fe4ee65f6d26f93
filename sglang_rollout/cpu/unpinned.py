"""Lets SGLang's LoRA run without a GPU: it locks memory for copies to one, for which torch needs a driver."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOCKING = (
    "sglang.srt.lora.lora_manager.LoRAManager.__init__",
    "sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend.prepare_lora_batch",
)


class Unpinned(TorchFunctionMode):
    """Within it tensors are made and copied in plain memory, where pinned memory is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


def register_hooks() -> None:
    """Before SGLang's scheduler starts: its LoRA locks no memory."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for function in _LOCKING:
        HookRegistry.register(function, _unpinned, HookType.AROUND)


def _unpinned(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    with Unpinned():
        return original(*arguments, **keywords)
