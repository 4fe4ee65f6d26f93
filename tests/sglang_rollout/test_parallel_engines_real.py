"""Real engines whose ranks are arranged in other ways than tensor-parallel ranks of one node.

Each serves the reference's log-probs before and after a weight sync, which reaches every rank. An engine over
two nodes is one over two processes here, which meet at a loopback address.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # as in test_engine.py


def dense(folder: Path) -> None:
    from tests.support.real_engine import write_model

    write_model(folder)


def tied(folder: Path) -> None:
    """The last stage's output layer is the first stage's embedding."""
    from tests.support.tiny import write_tiny_qwen2

    write_tiny_qwen2(folder, initializer_range=0.12, tie_word_embeddings=True, num_hidden_layers=3)


def mixture(folder: Path) -> None:
    """On a CPU SGLang serves experts of a multiple of 32 rows a rank."""
    from tests.support.tiny import write_tiny_qwen3_moe

    sizes = {"moe_intermediate_size": 64, "mlp_only_layers": [], "num_hidden_layers": 2}
    write_tiny_qwen3_moe(folder, vocab_size=128, initializer_range=0.12, **sizes)


@contextmanager
def started(
    folder: Path, write: Callable[[Path], None], **settings: Any
) -> "Iterator[tuple[RealEngine, Any]]":
    """The engine, and the connection of its other share if it has one."""
    from tests.support.real_engine import start
    from tests.support.share_process import further_share

    write(folder)
    with ExitStack() as stack:
        place, other = {}, None
        if settings.get("nodes", 1) > 1:
            place, other = stack.enter_context(further_share(folder, **settings))
        runner = stack.enter_context(asyncio.Runner())
        real = start(folder, runner.get_loop(), **place, **settings)
        stack.callback(real.engine.close)
        yield real, other


def check(real: "RealEngine", version: int) -> None:
    """Requests at once, of which some share a prefix, have the reference's log-probs."""
    from tests.support.real_engine import request

    rng = np.random.default_rng(version)
    contexts = [rng.integers(4, 128, 20 + n).astype(np.int32) for n in range(6)]
    contexts += [np.concatenate([contexts[0], context[:5]]) for context in contexts[1:3]]

    async def together() -> list[Any]:
        work = (real.engine.generate(request(context, max_tokens=24)) for context in contexts)
        return await asyncio.wait_for(asyncio.gather(*work), 120)

    for context, output in zip(contexts, real.run(together()), strict=True):
        assert output.version == version
        expected = real.log_probs(context, output.tokens, 1.0)
        np.testing.assert_allclose(output.log_probs, expected, atol=TOLERANCE)
        whole = np.concatenate([context, output.tokens])
        computed = real.run(real.engine.log_probs(whole))[len(context) - 1 :]
        np.testing.assert_allclose(computed, expected, atol=TOLERANCE)


def changed(real: "RealEngine") -> dict[str, torch.Tensor]:
    """Other weights under the names that a trainer sends, which the reference gets too."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    file = real.folder / "model.safetensors"
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    real.reference = AutoModelForCausalLM.from_pretrained(real.folder, dtype=torch.float32)
    return tensors


async def broadcast(real: "RealEngine", tensors: dict[str, torch.Tensor]) -> None:
    """Update by a broadcast over gloo, in which all ranks take part at once."""
    from tests.cluster.test_engine_death import FakeTrainer
    from treepo.config.weights import WeightsConfig
    from treepo.weight_sync.send import WeightStream, open_sender

    engine, version = real.engine, real.engine.version + 1
    trainer = FakeTrainer(tensors, real.folder)
    sender = open_sender(WeightsConfig(transport="host_broadcast"), real.folder, "127.0.0.1", 60)
    trainer._stream = WeightStream(sender, 1 << 14, 60)  # several buckets
    await engine.begin(version, await trainer.manifest())
    outcome = await trainer.send_weights(version, [Sink(real)])
    assert (outcome.failed, outcome.broken) == ({}, None)
    await engine.commit()
    trainer._stream.close()


class Sink:
    """Implements `treepo.weight_sync.send.WeightSink` for an engine on another thread's loop."""

    name, key = "the engine", "its only process"

    def __init__(self, real: "RealEngine") -> None:
        self._engine, self._loop = real.engine, real.loop
        self.ranks = real.engine._sglang.ranks

    def join(self, address: Any) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self._engine.join(address), self._loop)

    def load(self, bucket: Any) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self._engine.load(bucket), self._loop)


@pytest.mark.parametrize(
    ("write", "settings"),
    [
        (tied, {"pipeline": 2}),
        (mixture, {"tensor": 2, "expert": 2}),
        (dense, {"tensor": 2, "nodes": 2}),
        (mixture, {"pipeline": 2, "nodes": 2}),
    ],
    ids=["stages", "experts", "a layer over two nodes", "stages on two nodes"],
)
def test_all_ranks_serve_the_references_log_probs_and_take_new_weights(
    tmp_path: Path, write: Callable[[Path], None], settings: dict[str, Any]
) -> None:
    from tests.support.real_engine import update

    with started(tmp_path, write, **settings) as (real, other):
        check(real, 0)
        real.run(update(real.engine, changed(real)))  # through memory that all ranks of this machine map
        check(real, 1)
        real.run(broadcast(real, changed(real)))
        check(real, 2)
        if other is not None:
            assert other.poll(60)
            (rank,) = other.recv()
            os.kill(rank, signal.SIGKILL)  # the first share's ranks cannot answer without it
            assert real.run(asyncio.wait_for(real.engine.died(), 60))
