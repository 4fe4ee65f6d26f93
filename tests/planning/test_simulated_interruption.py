"""Interruption of the simulated engine: pieces, versions and times against a naive step-by-step engine."""

import asyncio
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.support.naive_batching import NaiveEngine, StatedRates
from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.protocols import GenerateOutput, GenerateRequest


@dataclass(frozen=True)
class Piece:
    """One answer. at: when it came."""

    path: int
    tokens: int
    version: int
    finish: str
    at: float


@dataclass(frozen=True)
class Stop:
    """At this time: an update to the next version, or a hold without one."""

    at: float
    seconds: float
    update: bool


async def follow(engine, path: int, start: float, request: GenerateRequest, pieces: list[Piece]) -> None:
    """Asks for the rest of an interrupted request until it is complete."""
    await asyncio.sleep(start)
    left = request.max_tokens
    while left:
        output = await engine.generate(replace(request, max_tokens=left, seed=100 * path + len(pieces)))
        left -= len(output.tokens)
        context = np.concatenate([request.context, output.tokens])
        request = replace(request, context=context)
        now = asyncio.get_running_loop().time()
        pieces.append(Piece(path, len(output.tokens), output.version, output.finish, now))


async def interrupt(engine, stops: list[Stop]) -> None:
    loop = asyncio.get_running_loop()
    version = 0
    for stop in stops:
        await asyncio.sleep(max(0.0, stop.at - loop.time()))
        if stop.update:
            version += 1
            await engine.begin(version)
        else:
            await engine.hold()
        await asyncio.sleep(stop.seconds)
        if stop.update:
            engine.commit()
        else:
            engine.release()


def play(engine, requests: list[tuple[float, GenerateRequest]], stops: list[Stop]) -> list[list[Piece]]:
    """Each path's pieces, in their order."""
    pieces: list[list[Piece]] = [[] for _ in requests]

    async def work() -> None:
        paths = [
            follow(engine, path, start, request, pieces[path])
            for path, (start, request) in enumerate(requests)
        ]
        await asyncio.gather(*paths, interrupt(engine, stops))

    run_virtually(work())
    return pieces


def drawn(seed: int) -> tuple[list[tuple[float, GenerateRequest]], list[Stop]]:
    """Requests of which half share a prefix, and stops at any time, some before anything runs."""
    draw = random.Random(seed)
    shared = np.arange(40, dtype=np.int32)
    requests = []
    for path in range(draw.randint(1, 9)):
        own = np.full(draw.randint(1, 20), 1000 + path, dtype=np.int32)
        context = np.concatenate([shared, own]) if draw.random() < 0.5 else own
        request = GenerateRequest(context, len(context), draw.randint(1, 60), 1.0, path)
        requests.append((draw.choice([0.0, draw.uniform(0, 3)]), request))
    stops = [
        Stop(at, draw.choice([0.0, draw.uniform(0, 0.5)]), draw.random() < 0.6)
        for at in sorted(draw.uniform(0, 4) for _ in range(draw.randint(0, 6)))
    ]
    return requests, stops


@pytest.mark.parametrize("seed", range(40))
def test_interruptions_are_those_of_step_after_step(seed: int) -> None:
    requests, stops = drawn(seed)
    naive, simulated = NaiveEngine(StatedRates(0.002)), SimulatedEngine(StatedRates(0.002), 10**6)
    expected, found = play(naive, requests, stops), play(simulated, requests, stops)
    for path, (_, request) in enumerate(requests):
        pieces = found[path]
        assert [replace(piece, at=0) for piece in pieces] == [
            replace(piece, at=0) for piece in expected[path]
        ]
        # Sums of steps in another order.
        assert [piece.at for piece in pieces] == pytest.approx([piece.at for piece in expected[path]])
        assert sum(piece.tokens for piece in pieces) == request.max_tokens
        assert all(piece.tokens > 0 for piece in pieces)
        assert [piece.finish for piece in pieces] == ["interrupted"] * (len(pieces) - 1) + ["length"]
    assert simulated.counts.steps == naive.steps
    assert simulated.counts.prefilled_tokens == naive.prefilled
    assert simulated.counts.interrupted == sum(len(pieces) - 1 for pieces in found)


@pytest.mark.parametrize("every", [1.9, 2.3, 3.1])
def test_retracted_requests_are_interrupted_too(every: float) -> None:
    """Six requests in a cache that holds the whole of one."""
    contexts = [np.full(10, path, dtype=np.int32) for path in range(6)]
    requests = [(0.0, GenerateRequest(context, 10, 200, 1.0, 0)) for context in contexts]
    engine = SimulatedEngine(StatedRates(), 300)
    stops = [Stop(every * n, 0.1, True) for n in range(1, 40)]
    for pieces in play(engine, requests, stops):
        assert sum(piece.tokens for piece in pieces) == 200
        versions = [piece.version for piece in pieces]
        assert versions == sorted(set(versions))  # one piece of each version
    assert engine.counts.retractions > 0
    assert engine.counts.peak_tokens <= 300
    assert engine.counts.decoded_tokens == 6 * 200


def test_a_commit_during_a_hold_lets_nothing_in() -> None:
    engine = SimulatedEngine(StatedRates(), 1000)
    request = GenerateRequest(np.arange(9, dtype=np.int32), 9, 50, 1.0, 0)

    async def work() -> tuple[GenerateOutput, float, GenerateOutput]:
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0.1)
        await engine.hold()
        second = asyncio.create_task(engine.generate(request))
        await engine.begin(1)
        engine.commit()
        await asyncio.sleep(10)
        assert not second.done()
        engine.release()
        return await first, loop.time(), await second

    interrupted, released, whole = run_virtually(work())
    assert (interrupted.finish, interrupted.version) == ("interrupted", 0)
    assert released > 10
    assert (whole.finish, whole.version, len(whole.tokens)) == ("length", 1, 50)


def test_a_prefix_is_found_again_after_a_hold_but_not_after_an_update() -> None:
    def prefilled(update: bool) -> int:
        engine = SimulatedEngine(StatedRates(), 1000)
        request = GenerateRequest(np.arange(200, dtype=np.int32), 200, 40, 1.0, 0)
        play(engine, [(0.0, request)], [Stop(0.2, 0.1, update)])
        return engine.counts.prefilled_tokens

    assert prefilled(update=False) < 210
    assert prefilled(update=True) > 400
