"""Control messages to SGLang's processes: commands about weights, the prefix cache, and device memory."""

from typing import Literal

from sglang_rollout.processes import SGLangProcesses
from sglang_rollout.receipts import Receipts
from sglang_rollout.weight_loader import LOADER, Answer, Command, message
from treepo.errors import EngineError


async def execute(sglang: SGLangProcesses, command: Command) -> None:
    """Have every rank execute a command about weights. Raises the failure of a rank."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

    assert sglang.store is not None
    receipts = Receipts.next(sglang.store, sglang.ranks)
    request = UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=[message(command, receipts)] * sglang.ranks,
        load_format=LOADER,
        flush_cache=False,
    )
    success, said = await sglang.manager.update_weights_from_tensor(request)
    if not success:
        raise EngineError(f"SGLang did not load weights: {said}")
    await receipts.check(sglang.store)


async def flush_cache(sglang: SGLangProcesses, seconds: float) -> None:
    """Free the memory of all cached prefixes. seconds: to wait for running requests."""
    flushed = await sglang.manager.flush_cache(timeout_s=seconds)
    if not flushed.success:
        raise EngineError(f"SGLang did not flush its prefix cache: {flushed.message}")


async def offload(sglang: SGLangProcesses) -> None:
    """Release the device memory."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    await sglang.manager.release_memory_occupation(ReleaseMemoryOccupationReqInput())
    await _all_stages(sglang)


async def reload(sglang: SGLangProcesses, part: Literal["weights", "cache"]) -> None:
    """Take one part of the device memory again."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    tags = {"weights": ["weights"], "cache": ["kv_cache", "cuda_graph"]}[part]
    await sglang.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
    await _all_stages(sglang)


async def _all_stages(sglang: SGLangProcesses) -> None:
    """Wait until all stages have done what SGLang was asked before; its own answers come from the first."""
    if sglang.stages > 1:
        await execute(sglang, Answer())
