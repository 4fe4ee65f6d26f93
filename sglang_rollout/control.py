"""Control messages to SGLang's processes: commands about weights, the prefix cache, and device memory."""

from typing import Literal

from sglang_rollout.processes import SGLangProcesses
from sglang_rollout.weight_loader import LOADER, Command, Receipts
from treepo.errors import EngineError


async def execute(sglang: SGLangProcesses, command: Command) -> None:
    """Have every rank execute a command about weights. Raises the failure of a rank."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
    from sglang.srt.utils import MultiprocessingSerializer

    receipts = Receipts(sglang.ranks)
    try:
        named = [("command", receipts.message(command))]
        # One message for each rank: the shared memory that a message names can be taken once.
        payloads = [MultiprocessingSerializer.serialize(named) for _ in range(sglang.ranks)]
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=payloads,  # type: ignore[reportArgumentType]  SGLang sends bytes too
            load_format=LOADER,
            flush_cache=False,
        )
        success, message = await sglang.manager.update_weights_from_tensor(request)
        if not success:
            raise EngineError(f"SGLang did not load weights: {message}")
        receipts.check()
    finally:
        receipts.close()


async def flush_cache(sglang: SGLangProcesses, seconds: float) -> None:
    """Free the memory of all cached prefixes. seconds: to wait for running requests."""
    flushed = await sglang.manager.flush_cache(timeout_s=seconds)
    if not flushed.success:
        raise EngineError(f"SGLang did not flush its prefix cache: {flushed.message}")


async def offload(sglang: SGLangProcesses) -> None:
    """Release the device memory."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    await sglang.manager.release_memory_occupation(ReleaseMemoryOccupationReqInput())


async def reload(sglang: SGLangProcesses, part: Literal["weights", "cache"]) -> None:
    """Take one part of the device memory again."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    tags = {"weights": ["weights"], "cache": ["kv_cache", "cuda_graph"]}[part]
    await sglang.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
