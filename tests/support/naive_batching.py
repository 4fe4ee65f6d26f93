"""Continuous batching step by step, naively; the cache never fills."""

import asyncio
from dataclasses import dataclass

import numpy as np

from treepo.planning.simulation.rates import Prefill
from treepo.protocols import GenerateOutput, GenerateRequest


@dataclass(frozen=True)
class StatedRates:
    """A step is bound by reading or by computing, depending on the contexts' length."""

    latency: float = 0.0

    def decode(self, requests: int, kv_tokens: np.ndarray) -> np.ndarray:
        reading, computing = 0.01 + 3e-5 * kv_tokens, 0.002 + 0.0015 * requests + 1e-5 * kv_tokens
        return np.maximum(np.maximum(reading, computing), 0.012)

    def prefill(self, batch: Prefill) -> float:
        return 0.005 + 1e-4 * batch.new + 1e-6 * batch.pairs + 1e-5 * batch.context + 1e-3 * batch.requests


@dataclass
class Request:
    request: GenerateRequest
    answer: asyncio.Future
    made: int = 0


class NaiveEngine:
    """Caches every prefix it has computed; decodes one token a step for each request.

    stop: while it is true nothing is computed, and what was running has been answered.
    """

    def __init__(self, rates: StatedRates) -> None:
        self.rates = rates
        self.known: set[bytes] = set()
        self.waiting: list[Request] = []
        self.steps = self.prefilled = self.version = 0
        self.stop = False
        self.serving: asyncio.Task | None = None

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        await asyncio.sleep(self.rates.latency)
        item = Request(request, asyncio.get_running_loop().create_future())
        self.waiting.append(item)
        self.start()
        return await item.answer

    def start(self) -> None:
        if self.serving is None and not self.stop:
            self.serving = asyncio.create_task(self.serve())

    async def hold(self) -> None:
        self.stop = True
        if self.serving is not None:
            await self.serving

    def release(self) -> None:
        self.stop = False
        self.start()

    async def begin(self, version: int) -> None:
        await self.hold()
        self.version, self.known = version, set()

    def commit(self) -> None:
        self.release()

    async def serve(self) -> None:
        running: list[Request] = []
        while (self.waiting or running) and not self.stop:
            if self.waiting:
                batch, self.waiting = self.waiting, []
                await asyncio.sleep(self.prefill([item.request.context for item in batch]))
                for item in batch:
                    self.know(item.request.context)
            else:
                kv = sum(len(item.request.context) + item.made for item in running)
                batch, running = running, []
                await asyncio.sleep(float(self.rates.decode(len(batch), np.array([kv]))[0]))
                self.steps += 1
            for item in batch:
                item.made += 1
                if item.made < item.request.max_tokens:
                    running.append(item)
                else:
                    self.end(item)
        for item in running:
            self.end(item)
        self.serving = None

    def prefill(self, contexts: list[np.ndarray]) -> float:
        new = pairs = 0
        for context in contexts:
            cached = max(n for n in range(len(context)) if n == 0 or context[:n].tobytes() in self.known)
            new += len(context) - cached
            pairs += sum(range(cached + 1, len(context) + 1))
        self.prefilled += new
        return self.rates.prefill(Prefill(len(contexts), new, sum(map(len, contexts)), pairs))

    def know(self, tokens: np.ndarray) -> None:
        self.known.update(tokens[:n].tobytes() for n in range(1, len(tokens) + 1))

    def end(self, item: Request) -> None:
        request = item.request
        tokens = np.random.default_rng(request.seed).integers(0, 4096, request.max_tokens, dtype=np.int32)
        tokens = tokens[: item.made]
        self.know(np.concatenate([request.context, tokens[:-1]]))
        finish = "length" if item.made == request.max_tokens else "interrupted"
        log_probs = np.zeros(len(tokens), dtype=np.float32)
        item.answer.set_result(GenerateOutput(tokens, log_probs, self.version, finish, cached_tokens=0))
