"""A real engine on a toy model: it starts, samples, takes new weights, and serves them."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from treepo.doctor.outcome import Outcome, failed, passed
from treepo.weight_sync.wire import Address, Bucket

if TYPE_CHECKING:
    from sglang_rollout.engine import SGLangEngine
    from treepo.doctor.toy_model import Toy

_KV_TOKENS = 4096
_NEW_TOKENS = 8
_BUCKET = 1 << 20
_SECONDS = 240.0  # a GPU may compile kernels at its first request
_WEIGHTS = (
    "the engine computes something else than transformers does with the same weights: check the versions"
)


@dataclass(frozen=True)
class LocalSink:
    """A `treepo.weight_sync.send.Sink` for an engine of this process, whose loop runs in another thread."""

    engine: "SGLangEngine"
    loop: asyncio.AbstractEventLoop
    name: str = "engine"
    key: str = "engine"
    ranks: int = 1

    def join(self, address: Address) -> "Future[None]":
        return self._submit(self.engine.join(address))

    def load(self, bucket: Bucket) -> "Future[None]":
        return self._submit(self.engine.load(bucket))

    def _submit(self, work: Coroutine[Any, Any, None]) -> "Future[None]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)


def engine() -> Outcome:
    from sglang_rollout.engine import SGLangEngine
    from treepo.config.engine import EngineConfig
    from treepo.doctor.toy_model import Toy, dtype_here

    toy = Toy(Path(mkdtemp()), dtype_here())  # among the temporary files of this check
    config = EngineConfig(max_total_tokens=_KV_TOKENS, update_seconds=_SECONDS, request_seconds=_SECONDS)
    serving = SGLangEngine(toy.folder, toy.dtype, config, seed=0)
    try:
        return asyncio.run(exercise(serving, toy))
    finally:
        serving.close()


async def exercise(engine: "SGLangEngine", toy: "Toy") -> Outcome:
    """Sample from it, change its weights, and compare its log-probs with transformers' each time."""
    from treepo.doctor.toy_model import difference
    from treepo.protocols import GenerateRequest

    request = GenerateRequest(toy.tokens, len(toy.tokens), _NEW_TOKENS, temperature=1.0, seed=0)
    sampled = await engine.generate(request)
    before = difference(await engine.log_probs(toy.tokens), toy.log_probs(toy.tokens))
    if not before <= toy.tolerance:  # a NaN fails too
        return failed(
            f"log-probs differ from transformers' by {before:.2g}, at most {toy.tolerance:g}", _WEIGHTS
        )
    broken = await _update(engine, toy)
    if broken:
        return failed(f"a weight update did not arrive: {broken}", "")
    again = await engine.generate(request)
    scores = await engine.log_probs(toy.tokens)
    after = difference(scores, toy.log_probs(toy.tokens, new=True))
    if not after <= toy.tolerance or again.version != 1:
        return failed(
            f"after a weight update to version 1 it serves version {again.version}, and log-probs "
            f"differ from transformers' by {after:.2g}, at most {toy.tolerance:g}",
            _WEIGHTS,
        )
    return passed(
        f"sampled {len(sampled.tokens)} tokens, took new weights; log-probs differ from transformers' by "
        f"{before:.1g}, then {after:.1g} ({toy.dtype})"
    )


async def _update(engine: "SGLangEngine", toy: "Toy") -> str:
    """The whole transaction as a run makes it. Returns what went wrong, if anything did."""
    from treepo.weight_sync.colocated import SharedSender
    from treepo.weight_sync.send import WeightStream
    from treepo.weight_sync.wire import TensorInfo

    weights = toy.new_weights()
    manifest = tuple(TensorInfo.of(name, tensor) for name, tensor in weights.items())
    await engine.begin(1, manifest)
    sink = LocalSink(engine, asyncio.get_running_loop())
    stream = WeightStream(SharedSender(), _BUCKET, _SECONDS)
    outcome = await asyncio.to_thread(stream.send, weights.items(), manifest, 1, [sink])
    if outcome.failed or outcome.broken:
        return outcome.broken or outcome.failed[sink.name]
    await engine.commit()
    return ""
