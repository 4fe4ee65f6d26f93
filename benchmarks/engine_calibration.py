"""Measures how fast a real engine is: times each kind of pass alone and fits lines through the times.

- Decoding: requests with cached contexts are decoded for few and for many steps; the difference is due to the
  steps alone.
- Prefill: one token is requested after each context, new or cached. Of several requests the first is
  prefilled alone and the others, which have arrived meanwhile, together; the fit assumes this.

Seconds are by the clock, or CPU time of SGLang's processes.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from sglang_rollout.engine import SGLangEngine
from treepo.planning.simulation.rates import Line, Prefill
from treepo.protocols import GenerateRequest

_DECODES = [(1, 32), (8, 32), (48, 32), (8, 256), (48, 256)]
_PREFILLS = [(1, 32), (8, 32), (1, 256), (8, 256)]
_CACHED = [(1, 32), (8, 32), (32, 32), (8, 256)]
_FEW_STEPS, _MANY_STEPS = 2, 14


@dataclass(frozen=True, slots=True)
class Timed:
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class FittedRates:
    """Seconds of each part of an engine's work.

    A decoding step takes `step` + `request` x requests + `token` x KV tokens. A prefill takes `batch` +
    `context` x requests + `new` x new tokens + `pair` x pairs. `latency` passes from an answer to the next
    request.
    """

    step: float
    request: float
    token: float
    latency: float
    batch: float
    context: float
    new: float
    pair: float

    def decode(self, requests: int) -> Sequence[Line]:
        return (Line(self.step + self.request * requests, self.token),)

    def prefill(self, batch: Prefill) -> float:
        return self.batch + self.context * batch.requests + self.new * batch.new + self.pair * batch.pairs


class Calibration:
    """Times of one engine, round after round. vocabulary: size, for the random tokens of contexts."""

    def __init__(self, engine: SGLangEngine, vocabulary: int) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._generator = np.random.default_rng(1)
        self._decodes: dict[tuple[float, ...], list[Timed]] = {}
        self._prefills: dict[tuple[float, ...], list[Timed]] = {}

    async def round(self) -> None:
        """Time each kind of pass once."""
        for requests, length in _DECODES:
            contexts = await self._cached(requests, length)
            few, many = [await timed(self._ask(contexts, steps)) for steps in (_FEW_STEPS, _MANY_STEPS)]
            steps = _MANY_STEPS - _FEW_STEPS
            tokens = requests * (length + (_FEW_STEPS + _MANY_STEPS) / 2)
            one = Timed((many.seconds - few.seconds) / steps, (many.cpu_seconds - few.cpu_seconds) / steps)
            self._decodes.setdefault((1.0, requests, tokens), []).append(one)
        for requests, length in _PREFILLS:
            contexts = self._contexts(requests, length)
            row = (1.0, min(requests, 2), requests, requests * length, requests * length * (length + 1) / 2)
            self._prefills.setdefault(row, []).append(await timed(self._ask(contexts, 1)))
        for requests, length in _CACHED:
            contexts = await self._cached(requests, length)
            row = (1.0, min(requests, 2), requests, requests, requests * length)
            self._prefills.setdefault(row, []).append(await timed(self._ask(contexts, 1)))
        await self._engine.clear_cache()

    def fit(self, cpu: bool) -> FittedRates:
        """Fit rates to the medians over the rounds. cpu: by CPU time instead of the clock."""
        return FittedRates(*fitted(self._decodes, cpu), *fitted(self._prefills, cpu))

    def _contexts(self, count: int, length: int) -> list[np.ndarray]:
        drawn = self._generator.integers(0, self._vocabulary, size=(count, length), dtype=np.int32)
        return list(drawn)

    async def _cached(self, count: int, length: int) -> list[np.ndarray]:
        contexts = self._contexts(count, length)
        await self._ask(contexts, 1)
        return contexts

    async def _ask(self, contexts: Sequence[np.ndarray], tokens: int) -> None:
        requests = (
            GenerateRequest(context, len(context), tokens, temperature=1.0, seed=index)
            for index, context in enumerate(contexts)
        )
        await asyncio.gather(*(self._engine.generate(request) for request in requests))


def fitted(times: dict[tuple[float, ...], list[Timed]], cpu: bool) -> list[float]:
    """The cost of each column of the rows, at least 0: least squares of relative errors."""
    rows = np.array(list(times))
    medians = np.array([
        statistics.median(one.cpu_seconds if cpu else one.seconds for one in repeats)
        for repeats in times.values()
    ])  # fmt: skip
    medians = np.maximum(medians, 1e-4)
    used = list(range(rows.shape[1]))
    while True:
        costs, *_ = np.linalg.lstsq(rows[:, used] / medians[:, None], np.ones(len(rows)), rcond=None)
        if costs.min() >= 0:
            break
        del used[int(costs.argmin())]
    result = [0.0] * rows.shape[1]
    for column, cost in zip(used, costs.tolist(), strict=True):
        result[column] = cost
    return result


async def timed(work: Awaitable[object]) -> Timed:
    start, cpu = time.perf_counter(), engine_cpu_seconds()
    await work
    return Timed(time.perf_counter() - start, engine_cpu_seconds() - cpu)


def engine_cpu_seconds() -> float:
    """CPU time of all child processes, which are SGLang's."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)
