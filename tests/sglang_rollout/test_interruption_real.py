"""The real SGLang engine is interrupted: what was decoded comes back, the rest is sampled by new weights."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from treepo.errors import DeadEngineError, EngineError
from treepo.protocols import GenerateOutput, GenerateRequest

if TYPE_CHECKING:
    import torch

    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # float32 on both sides, and weights of three updates: ten times that of test_engine.py
CONTEXT = np.arange(20, 50, dtype=np.int32)


@pytest.fixture
def crowded_engine(tmp_path: Path) -> Iterator["RealEngine"]:
    """An engine that decodes four requests at once and reads contexts in pieces, so that others queue."""
    import tests.support.real_engine as harness

    settings = {"max_running_requests": 4, "chunked_prefill_size": 64}
    with asyncio.Runner() as runner:
        real = harness.start(harness.write_model(tmp_path), runner.get_loop(), sglang=settings)
        yield real
        real.engine.close()


def copy_of(weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    return {name: tensor.clone() for name, tensor in weights.items()}


async def parts_of(real: "RealEngine", request: GenerateRequest) -> list[GenerateOutput]:
    """Sample all tokens of a request, with another request after each interruption."""
    parts: list[GenerateOutput] = []
    left, context = request.max_tokens, request.context
    while left:
        output = await real.engine.generate(replace(request, context=context, max_tokens=left))
        parts.append(output)
        context = np.concatenate([context, output.tokens])
        left -= len(output.tokens)
        if output.finish != "interrupted":
            break
    return parts


def assert_sampled_by(
    real: "RealEngine",
    weights: "dict[int, dict[str, torch.Tensor]]",
    request: GenerateRequest,
    parts: list[GenerateOutput],
) -> None:
    """The tokens of each part have the log-probs that its version's weights give after all those before."""
    context = request.context
    for part in parts:
        real.reference.load_state_dict(weights[part.version], strict=False)
        expected = real.log_probs(context, part.tokens, request.temperature)
        np.testing.assert_allclose(part.log_probs, expected, atol=TOLERANCE)
        context = np.concatenate([context, part.tokens])


@pytest.mark.parametrize("check_every", [0, 16, 512])
def test_an_update_interrupts_wherever_decoding_is(real_engine: "RealEngine", check_every: int) -> None:
    from tests.support.real_engine import perturbed, request, update

    engine = real_engine.engine
    old = real_engine.update(perturbed(real_engine.reference, 0.01))
    weights = {old: copy_of(real_engine.reference.state_dict())}
    weights[old + 1] = copy_of(perturbed(real_engine.reference))
    whole: list[tuple[GenerateRequest, list[GenerateOutput]]] = []
    seeds, decoding, updated = itertools.count(), asyncio.Event(), asyncio.Event()

    def note(response: np.ndarray) -> bool:
        if len(response) >= 5:
            decoding.set()
        return False

    real_engine.stop_rule.holds = note

    async def ask(every: int) -> None:
        """One request after another, so that some decode when the update comes, however late it is."""
        while not updated.is_set():
            one = request(CONTEXT, max_tokens=900, check_every=every, seed=next(seeds))
            whole.append((one, await parts_of(real_engine, one)))

    async def change() -> None:
        await decoding.wait()
        await update(engine, weights[old + 1])
        updated.set()

    async def scenario() -> None:
        watched = [1] * 9  # the stop rule sees each of their tokens
        await asyncio.gather(change(), *map(ask, [check_every] * 30 + watched))

    real_engine.run(scenario())
    interrupted = [parts for _, parts in whole if len(parts) > 1]
    assert interrupted
    assert any(len(parts[0].tokens) % 16 for parts in interrupted), "wherever, not at boundaries"
    for one, parts in whole:
        assert [part.version for part in parts] in ([old], [old + 1], [old, old + 1])
        assert parts[-1].finish == "eos" or sum(len(part.tokens) for part in parts) == 900
        assert_sampled_by(real_engine, weights, one, parts)


def test_interruptions_in_queue_and_prefill_and_decoding_lose_and_mix_nothing(
    crowded_engine: "RealEngine",
) -> None:
    """Holds and updates come at any time, while requests wait, read their contexts, and decode."""
    from tests.support.real_engine import perturbed, request, update

    real, rng = crowded_engine, np.random.default_rng(0)
    engine = real.engine
    weights = {0: copy_of(real.reference.state_dict())}
    for version in (1, 2, 3):
        weights[version] = copy_of(perturbed(real.reference))
    asked = [
        request(
            rng.integers(4, 128, rng.integers(2, 700)),
            max_tokens=int(rng.integers(1, 100)),
            check_every=int(rng.choice([0, 1, 7, 64])),
            seed=seed,
        )
        for seed in range(60)
    ]

    async def disturb() -> None:
        for version in (1, 2, 3):
            for seconds in (0.0, 0.001, 0.01, 0.05, 0.1, 0.3):
                await asyncio.sleep(seconds)
                await engine.hold()
                assert not engine._requests._running
                engine.release()
            await update(engine, weights[version])

    async def scenario() -> list[list[GenerateOutput]]:
        disturbing = asyncio.ensure_future(disturb())
        whole = await asyncio.gather(*(parts_of(real, one) for one in asked))
        await disturbing
        return whole

    whole = real.run(scenario())
    assert any(len(parts) > 1 for parts in whole)
    for one, parts in zip(asked, whole, strict=True):
        assert all(len(part.tokens) for part in parts)
        versions = [part.version for part in parts]
        assert versions == sorted(versions)
        assert parts[-1].finish == "eos" or sum(len(part.tokens) for part in parts) == one.max_tokens
        assert_sampled_by(real, weights, one, parts)


def test_the_stop_rule_holds_at_a_boundary_that_was_passed_before_the_interruption(
    real_engine: "RealEngine",
) -> None:
    """An interrupted request never has more tokens than one that was left alone."""
    from tests.support.real_engine import request

    engine, limit = real_engine.engine, 24
    real_engine.stop_rule.holds = lambda response: len(response) >= limit
    asked = [request(CONTEXT, max_tokens=100, check_every=8, seed=seed) for seed in range(20)]

    async def scenario() -> list[GenerateOutput]:
        running = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        while not engine._requests._running:
            await asyncio.sleep(0)
        for _ in range(20):
            await engine.hold()
            engine.release()
            await asyncio.sleep(0.01)
        return await asyncio.gather(*running)

    for output in real_engine.run(scenario()):
        assert len(output.tokens) <= limit
        assert output.finish != "length" or len(output.tokens) == limit


def test_a_commit_during_a_hold_lets_nothing_in(real_engine: "RealEngine") -> None:
    from tests.support.real_engine import perturbed, request, update

    engine = real_engine.engine
    weights = copy_of(perturbed(real_engine.reference))

    async def scenario() -> GenerateOutput:
        await engine.hold()
        assert engine.status == "held"
        waiting = asyncio.ensure_future(engine.generate(request(CONTEXT)))
        log_probs = asyncio.ensure_future(engine.log_probs(CONTEXT))
        version = await update(engine, weights)
        await asyncio.wait((waiting, log_probs), timeout=0.2)
        assert not waiting.done()
        assert not log_probs.done()
        engine.release()
        await log_probs
        output = await waiting
        assert output.version == version
        return output

    output = real_engine.run(scenario())
    real_engine.reference.load_state_dict(weights)
    expected = real_engine.log_probs(CONTEXT, output.tokens, 1.0)
    np.testing.assert_allclose(output.log_probs, expected, atol=TOLERANCE)


def test_a_health_check_asks_a_held_engine_for_nothing(
    real_engine: "RealEngine", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request would find the memory of weights and cache offloaded."""
    engine = real_engine.engine
    manager = engine._sglang.manager
    generate_request, requests = manager.generate_request, []

    def count(request: object) -> object:
        requests.append(request)
        return generate_request(request)

    async def scenario() -> None:
        await engine.hold()
        await engine.health_check()
        assert not requests
        engine.release()
        await engine.health_check()
        assert len(requests) == 1

    monkeypatch.setattr(manager, "generate_request", count)
    real_engine.run(scenario())


def test_log_probs_are_computed_to_the_end_before_an_engine_is_held(real_engine: "RealEngine") -> None:
    engine = real_engine.engine

    async def scenario() -> np.ndarray:
        computing = asyncio.ensure_future(engine.log_probs(np.tile(CONTEXT, 20)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await engine.hold()
        engine.release()
        return await computing

    assert len(real_engine.run(scenario())) == 20 * len(CONTEXT) - 1


def test_a_request_that_sglang_itself_ends_is_an_error(real_engine: "RealEngine") -> None:
    from tests.support.real_engine import request

    engine = real_engine.engine

    async def scenario() -> None:
        running = asyncio.ensure_future(engine.generate(request(CONTEXT, max_tokens=900, temperature=0.1)))
        while not engine._requests._running:
            await asyncio.sleep(0)
        (name,) = engine._requests._running
        engine._sglang.manager.abort_request(name)
        with pytest.raises(EngineError, match="SGLang ended a request"):
            await running

    real_engine.run(scenario())


def test_an_engine_that_dies_while_it_is_held_says_so_to_all_who_wait(crowded_engine: "RealEngine") -> None:
    from tests.support.real_engine import request

    engine = crowded_engine.engine

    async def scenario() -> None:
        running = asyncio.ensure_future(engine.generate(request(CONTEXT, max_tokens=900)))
        while not engine._requests._running:
            await asyncio.sleep(0)
        for child in engine._sglang._children:
            child.suspend()
        holding = asyncio.ensure_future(engine.hold())
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(engine.generate(request(CONTEXT)))
        await asyncio.wait((running, holding, waiting), timeout=0.1)
        for child in engine._sglang._children:
            child.kill()
        for work in (running, holding, waiting):
            with pytest.raises(DeadEngineError, match="ended"):
                await work

    crowded_engine.run(scenario())
