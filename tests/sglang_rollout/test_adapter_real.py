"""Weight syncs that bring a real SGLang engine an adapter alone: it serves what the merged weights would."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from treepo.config.trainer import LoraConfig
from treepo.errors import EngineError

if TYPE_CHECKING:
    import torch

    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

# Float32 on both sides; the engine adds B A x to W x, transformers multiplies W + B A.
TOLERANCE = 1e-5
LORA = LoraConfig(rank=4, alpha=12.0)
CONTEXT = np.arange(20, 50, dtype=np.int32)
Adapter = dict[str, "torch.Tensor"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "tensor 2"])
def adapter_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["RealEngine"]:
    import tests.support.real_engine as harness

    with asyncio.Runner() as runner:
        # On a CPU SGLang pads the rows of an MLP that it cannot divide into blocks of 32 a rank.
        folder = harness.write_model(tmp_path_factory.mktemp("engine"), intermediate_size=128)
        real = harness.start(folder, runner.get_loop(), lora=LORA, tensor=request.param)
        yield real
        real.engine.close()


def some_adapter(real: "RealEngine", seed: int) -> Adapter:
    import torch

    from sglang_rollout.weight_update import adapter_shapes, checkpoint_shapes

    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(checkpoint_shapes(real.folder), LORA)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def send(real: "RealEngine", adapter: Adapter) -> None:
    from tests.support.real_engine import update

    real.run(update(real.engine, adapter))


def merged(real: "RealEngine", adapter: Adapter | None) -> "RealEngine":
    """The same engine, with the model of its folder and the adapter merged into it as the reference."""
    import torch
    from transformers import AutoModelForCausalLM

    from treepo.data.peft_names import peft_name

    reference = AutoModelForCausalLM.from_pretrained(real.folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if adapter is not None and (a := peft_name(name, "A")) in adapter:
                weight += LORA.alpha / LORA.rank * adapter[peft_name(name, "B")] @ adapter[a]
    return replace(real, reference=reference)


def assert_serves(real: "RealEngine", adapter: Adapter | None) -> None:
    expected = merged(real, adapter)
    outputs = real.run(_at_once(real))
    for length, output in outputs.items():
        assert output.version == real.engine.version
        log_probs = expected.log_probs(CONTEXT[:length], output.tokens, 1.0)
        np.testing.assert_allclose(output.log_probs, log_probs, atol=TOLERANCE)


async def _at_once(real: "RealEngine"):
    from tests.support.real_engine import request

    lengths = [8, 15, 30]  # a batch of several
    calls = (real.engine.generate(request(CONTEXT[:length])) for length in lengths)
    return dict(zip(lengths, await asyncio.gather(*calls), strict=True))


def test_an_adapter_alone_gives_the_log_probs_of_merged_weights(adapter_engine: "RealEngine") -> None:
    """First the folder's own weights, then one adapter after another."""
    assert_serves(adapter_engine, None)
    assert adapter_engine.engine.version == 0
    before = adapter_engine.run(adapter_engine.engine.log_probs(CONTEXT))
    for seed in range(2):
        adapter = some_adapter(adapter_engine, seed)
        send(adapter_engine, adapter)
        assert adapter_engine.engine.version == seed + 1
        assert_serves(adapter_engine, adapter)
        after = adapter_engine.run(adapter_engine.engine.log_probs(CONTEXT))
        assert np.abs(after - before).max() > 0.01
        before = after


def test_prefixes_of_another_adapter_are_not_matched(adapter_engine: "RealEngine") -> None:
    send(adapter_engine, some_adapter(adapter_engine, 3))
    adapter_engine.generate(CONTEXT)
    assert adapter_engine.generate(CONTEXT).cached_tokens == len(CONTEXT) - 1
    send(adapter_engine, some_adapter(adapter_engine, 4))
    assert adapter_engine.generate(CONTEXT).cached_tokens == 0


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_another_adapter_is_refused_before_it_begins(adapter_engine: "RealEngine", fault: str) -> None:
    from tests.support.real_engine import manifest

    adapter = some_adapter(adapter_engine, 5)
    send(adapter_engine, adapter)
    good = manifest(adapter)
    bad = {
        "missing": good[1:],
        "unexpected": (*good, replace(good[0], name="model.norm.weight")),
        "shape": (replace(good[0], shape=(3, 5)), *good[1:]),
    }[fault]
    with pytest.raises(EngineError, match=fault):
        adapter_engine.run(adapter_engine.engine.begin(adapter_engine.engine.version + 1, bad))
    assert_serves(adapter_engine, adapter)


@pytest.mark.parametrize("fault", ["checksum", "missing"])
def test_an_adapter_that_did_not_arrive_whole_is_not_served(adapter_engine: "RealEngine", fault: str) -> None:
    """Nor are its tensors in the adapter that comes after it."""
    from tests.support.real_engine import buckets, manifest
    from tests.support.weight_sinks import CPU
    from treepo.weight_sync.colocated import ColocatedSender

    engine, broken = adapter_engine.engine, some_adapter(adapter_engine, 6)
    version = engine.version

    async def broken_update() -> None:
        await engine.begin(version + 1, manifest(broken))
        sender = ColocatedSender(CPU)
        await engine.join(sender.addresses([engine._sglang.ranks]))
        for number, bucket in enumerate(buckets(sender, broken)):
            if number == 1 and fault == "checksum":
                bucket = replace(bucket, checksums=((0,),))
            if not (number == 1 and fault == "missing"):
                await engine.load([bucket])
        await engine.commit()

    with pytest.raises(EngineError, match=fault):
        adapter_engine.run(broken_update())
    with pytest.raises(EngineError, match="refuses to serve"):
        adapter_engine.generate(CONTEXT)
    engine.abort("a fault")
    assert engine.version == version
    adapter = some_adapter(adapter_engine, 7)
    send(adapter_engine, adapter)
    assert_serves(adapter_engine, adapter)


def test_an_adapter_that_sglang_does_not_take_fails_the_commit(tmp_path: Path) -> None:
    """Not the first request, which would end SGLang. Two ranks pad the 96 rows of this MLP, but not A."""
    import tests.support.real_engine as harness

    with asyncio.Runner() as runner:
        folder = harness.write_model(tmp_path / "model", intermediate_size=96)
        real = harness.start(folder, runner.get_loop(), lora=LORA, tensor=2)
        try:
            with pytest.raises(EngineError, match=r"SGLang.s LoRA does not take the adapter: .* shape"):
                send(real, some_adapter(real, 0))
            with pytest.raises(EngineError, match="refuses to serve"):
                real.generate(CONTEXT)
            assert not real.engine._sglang.death.done()
        finally:
            real.engine.close()
