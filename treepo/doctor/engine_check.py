"""The check `engine`: a real SGLang engine starts on a toy model, samples, takes new weights, serves them."""

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from treepo.data.daemon_thread import in_thread
from treepo.doctor.check import Outcome, failed, passed
from treepo.weight_sync.wire import Address, Bucket

if TYPE_CHECKING:
    from sglang_rollout.engine import SGLangEngine
    from treepo.doctor.toy_model import Toy

_KV_TOKENS = 4096
_NEW_TOKENS = 8
_BUCKET_BYTES = 1 << 20
_SECONDS = 240.0  # a GPU may compile kernels at its first request
_DISAGREES = "engine and transformers disagree on the same weights: check the versions of the packages"


@dataclass(frozen=True)
class LocalSink:
    """Implements `treepo.weight_sync.send.WeightSink`; the engine's event loop runs in another thread."""

    engine: "SGLangEngine"
    loop: asyncio.AbstractEventLoop
    name: str = "engine"
    key: str = "engine"
    ranks: int = 1

    def join(self, addresses: Sequence[Address]) -> "Future[None]":
        return self._submit(self.engine.join(addresses))

    def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
        return self._submit(self.engine.load(buckets))

    def _submit(self, coroutine: Coroutine[Any, Any, None]) -> "Future[None]":
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


def engine() -> Outcome:
    import torch

    from sglang_rollout.engine import SGLangEngine
    from treepo.config.engine import EngineConfig
    from treepo.doctor.toy_model import Toy, native_dtype

    toy = Toy(Path(mkdtemp()), native_dtype())  # deleted with this check's temporary files
    config = EngineConfig(max_total_tokens=_KV_TOKENS, update_seconds=_SECONDS, request_seconds=_SECONDS)
    # On a GPU as a run that shares it with the trainer.
    sglang = SGLangEngine(toy.folder, toy.dtype, config, seed=0, shares_device=torch.cuda.is_available())
    try:
        return asyncio.run(sample_and_update(sglang, toy))
    finally:
        sglang.close()


async def sample_and_update(engine: "SGLangEngine", toy: "Toy") -> Outcome:
    """Sample, update the weights, sample again; compare log-probs with transformers' before and after."""
    from treepo.doctor.toy_model import max_difference
    from treepo.protocols import GenerateRequest

    request = GenerateRequest(toy.tokens, len(toy.tokens), _NEW_TOKENS, temperature=1.0, seed=0)
    sampled = await engine.generate(request)
    before = max_difference(await engine.log_probs(toy.tokens), toy.log_probs(toy.tokens))
    if not before <= toy.tolerance:  # a NaN fails too
        return failed(
            f"log-probs differ from transformers' by {before:.2g}, at most {toy.tolerance:g} is allowed",
            _DISAGREES,
        )
    error = await _update_weights(engine, toy)
    if error:
        return failed(f"a weight sync failed: {error}", "")
    again = await engine.generate(request)
    log_probs = await engine.log_probs(toy.tokens)
    after = max_difference(log_probs, toy.log_probs(toy.tokens, new=True))
    if not after <= toy.tolerance or again.version != 1:
        return failed(
            f"after a weight sync to version 1 it serves version {again.version}, and log-probs "
            f"differ from transformers' by {after:.2g}, at most {toy.tolerance:g} is allowed",
            _DISAGREES,
        )
    return passed(
        f"sampled {len(sampled.tokens)} tokens, took new weights; log-probs differ from transformers' by "
        f"{before:.1g}, then {after:.1g} ({toy.dtype})"
    )


async def _update_weights(engine: "SGLangEngine", toy: "Toy") -> str:
    """The transaction that a run makes after a step. Returns the error, empty if there is none."""
    from treepo.config.weights import WeightsConfig
    from treepo.weight_sync.lanes import LocalSource
    from treepo.weight_sync.send import WeightStream, open_sender
    from treepo.weight_sync.wire import TensorInfo

    weights = toy.new_weights()
    manifest = tuple(TensorInfo.of(name, tensor) for name, tensor in weights.items())
    await engine.begin(1, manifest)
    sink = LocalSink(engine, asyncio.get_running_loop())
    sender = open_sender(WeightsConfig(transport="colocated"), toy.folder, "127.0.0.1", _SECONDS)
    stream = WeightStream(sender, _BUCKET_BYTES, _SECONDS)
    outcome = await in_thread(lambda: stream.send(LocalSource(weights.items(), manifest), 1, [sink]))
    if outcome.failed or outcome.broken:
        return outcome.broken or str(outcome.failed[sink.name])
    await engine.commit()
    return ""
