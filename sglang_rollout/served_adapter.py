"""Serves a trainer's adapter beside the model folder's weights, in each of SGLang's scheduler processes.

The tensors of a weight sync are put aside until all have arrived; then they replace the adapter that was
served. SGLang's own LoRA divides them among tensor-parallel ranks and computes them.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from treepo.config.trainer import LoraConfig
from treepo.errors import EngineError

ADAPTER = "treepo"
"""SGLang's id of the adapter, in every request that it serves."""

_manager: Any = None  # global, because SGLang calls a function
_aside: dict[str, Tensor] = {}


def sglang_lora(lora: LoraConfig) -> dict[str, Any]:
    """SGLang's arguments with which it can serve an adapter."""
    return {
        "enable_lora": True,
        "max_lora_rank": lora.rank,
        "lora_target_modules": list(lora.targets),
        "max_loras_per_batch": 1,  # no request is in a batch with those of other weights
    }


def register_hooks() -> None:
    """Before SGLang's scheduler starts: remember its LoRA manager."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def remember(_result: None, manager: Any, *_: Any, **__: Any) -> None:
        global _manager
        _manager = manager

    HookRegistry.register("sglang.srt.lora.lora_manager.LoRAManager.__init__", remember, HookType.AFTER)


def put_aside(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Keep tensors, by PEFT's names, until the update ends."""
    _aside.update((name, tensor.to("cpu", copy=True)) for name, tensor in tensors)


def forget() -> None:
    """Forget the tensors of an update that has not ended."""
    _aside.clear()


def serve(lora: LoraConfig) -> None:
    """Serve the tensors that were put aside in place of the adapter before. Raises EngineError."""
    from sglang.srt.lora.lora_registry import LoRARef

    reference = LoRARef(lora_id=ADAPTER, lora_name=ADAPTER, lora_path=ADAPTER, pinned=False)
    config = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
    }
    if ADAPTER in _manager.loras:
        _check(_manager.unload_lora_adapter(reference))
    _check(_manager.load_lora_adapter_from_tensors(reference, dict(_aside), config))
    try:
        _manager.fetch_new_loras({ADAPTER})  # onto the device now; SGLang itself would wait for a request
    except AssertionError as error:
        raise EngineError(f"SGLang's LoRA does not take the adapter: {error}") from None
    forget()


def _check(result: Any) -> None:
    if not result.success:
        raise EngineError(f"SGLang's LoRA: {result.error_message}")
