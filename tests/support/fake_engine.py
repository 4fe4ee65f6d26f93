"""A fake engine whose model draws every token by chance: it ends, boxes or babbles.

Its log-probs are a function of the whole prefix. Computing them again for a trajectory shows whether each
token was sampled after exactly the tokens that the tree has above it.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from treepo.errors import EngineError
from treepo.protocols import GenerateOutput, GenerateRequest

EOS = 0
BOX = 1
VOCABULARY = 512


def decode(tokens: np.ndarray) -> str:
    """Token 1 is a whole box; the others are letters."""
    return "".join("\\boxed{7}" if token == BOX else chr(ord("a") + token % 26) for token in tokens)


def log_probs_of(tokens: np.ndarray) -> np.ndarray:
    """Log-prob of every token given the tokens before it: float32 [T]."""
    powers = np.full(len(tokens), 0x9E3779B97F4A7C15, dtype=np.uint64)
    prefix = np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * np.cumprod(powers))
    prefix ^= prefix >> np.uint64(29)
    return -((prefix * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(40)).astype(np.float32) / np.float32(2**23)


def routes_of(tokens: np.ndarray, reader: int) -> np.ndarray:
    """Routes of a request that reads the tokens: uint8 [T, 2, 3], of the prefix and of the request.

    In a real engine they depend on the request through its version, and through rounding.
    """
    prefix = -log_probs_of(tokens).astype(np.float64)[:, None] * 2**23 + 7919 * reader
    return (prefix * [1, 3, 7, 11, 13, 17] % 251).astype(np.uint8).reshape(-1, 2, 3)


def prompt_tokens(index: int, length: int = 5) -> np.ndarray:
    """A prompt of its own for each index."""
    return np.random.default_rng(index).integers(2, VOCABULARY, size=length, dtype=np.int32)


def random_interruptions(seed: int, chance: float, longest: int) -> Iterator[int]:
    """Interruptions for a `FakeEngine`: with `chance`, an answer ends after 1 to `longest` tokens."""
    rng = random.Random(seed)
    while True:
        yield rng.randint(1, longest) if rng.random() < chance else 0


@dataclass
class FakeEngine:
    """An engine whose tokens depend only on the request's seed; each is EOS or a box with the given chances.

    stop_rule: ends long requests at segment boundaries, as in a real engine; None: decoding goes on.
    shuffle: seed of random delays, which change the order of the answers; None: no delays.
    fails: whether a request fails, from its number and itself.
    pause_after: if not 0, a long request returns after this many boundaries.
    letters: number of distinct tokens besides EOS and the box.
    caches: whether there is a prefix cache.
    interruptions: for each answer the tokens after which a weight update interrupts it, so that later tokens
        have the next version; 0, or more than the answer has: none does.
    """

    end: float = 0.0
    box: float = 0.0
    version: int = 0
    stop_rule: Callable[[np.ndarray], bool] | None = None
    shuffle: int | None = None
    fails: Callable[[int, GenerateRequest], bool] = lambda _number, _request: False
    pause_after: int = 0
    letters: int = VOCABULARY - 2
    caches: bool = False
    interruptions: Iterator[int] = field(default_factory=lambda: repeat(0))
    requests: list[GenerateRequest] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    _known: set[bytes] = field(default_factory=set)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        self.requests.append(request)
        self.running += 1
        order = random.Random(len(self.requests) if self.shuffle is None else self.shuffle + request.seed)
        try:
            for _ in range(1 if self.shuffle is None else order.randrange(1, 20)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.fails(len(self.requests), request):
            raise EngineError("the fake engine fails on purpose")
        return self.answer(request)

    def answer(self, request: GenerateRequest) -> GenerateOutput:
        """The output, without delay."""
        tokens, chances = self.draw(request)
        tokens[chances < self.end + self.box] = BOX
        ends = np.flatnonzero(chances < self.end)
        if len(ends):
            tokens = tokens[: ends[0] + 1]
            tokens[-1] = EOS
        tokens = tokens[: self._stop(request, tokens)]
        interrupted = 0 < (decoded := next(self.interruptions)) <= len(tokens)
        if interrupted:
            tokens = tokens[:decoded]
        context = np.concatenate([request.context, tokens])
        output = GenerateOutput(
            tokens=tokens,
            log_probs=log_probs_of(context)[len(request.context) :],
            version=self.version,
            finish="eos" if tokens[-1] == EOS else "interrupted" if interrupted else "length",
            cached_tokens=self._cached(request.context, context) if self.caches else 0,
            routes=self._routes(request, context),
        )
        self.version += interrupted
        return output

    def draw(self, request: GenerateRequest) -> tuple[np.ndarray, np.ndarray]:
        """Letters, int32 [T], and numbers from 0 to 1, float64 [T], that decide which become EOS or a box."""
        generator = np.random.default_rng(request.seed)
        letters = generator.integers(2, 2 + self.letters, size=request.max_tokens, dtype=np.int32)
        return letters, generator.random(request.max_tokens)

    def _stop(self, request: GenerateRequest, tokens: np.ndarray) -> int:
        every = request.check_every
        if not every:
            return len(tokens)
        response = np.concatenate([request.context[request.prompt_tokens :], tokens])
        above = len(response) - len(tokens)
        for number, boundary in enumerate(range(every, len(tokens), every), start=1):
            if self.stop_rule is not None and self.stop_rule(response[: above + boundary]):
                return boundary
            if number == self.pause_after:
                return boundary
        return len(tokens)

    def _routes(self, request: GenerateRequest, whole: np.ndarray) -> np.ndarray | None:
        if request.routes_from is None:
            return None
        reader = request.seed % 10_000 + 10_000 * self.version
        return routes_of(whole[:-1], reader)[request.routes_from :]

    def _cached(self, context: np.ndarray, whole: np.ndarray) -> int:
        """Length of the longest prefix of the context, without its last token, that was computed before."""
        cached = len(context) - 1
        while cached and context[:cached].tobytes() not in self._known:
            cached -= 1
        self._known.update(whole[:length].tobytes() for length in range(cached, len(whole)))
        return cached


class SteadyEngine(FakeEngine):
    """A token also depends on the length of its context, but not on where its request began.

    So after an interruption, a request with the same seed goes on as the first one would have.
    """

    def draw(self, request: GenerateRequest) -> tuple[np.ndarray, np.ndarray]:
        above = len(request.context)
        draws = np.random.default_rng(request.seed).random((above + request.max_tokens, 2))[above:]
        return (2 + draws[:, 0] * self.letters).astype(np.int32), draws[:, 1]
