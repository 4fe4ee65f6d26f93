"""Answers of a real or simulated engine with drawn instead of sampled lengths. Units: response tokens.

A path of `a` response tokens ends at a length drawn from a log-normal given that it is greater than `a`, by
the seed of its request. So every path ends as a sample of the policy would, whatever is above it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from treepo.data.prompts import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest, Sampler
from treepo.rollout import rng

_NORMAL = NormalDist()
Ends = Callable[[GenerateRequest], int]
"""Response tokens at which the path of a request ends."""


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Response lengths: their mean, and the standard deviation of their logarithm."""

    mean: float
    sigma: float

    def draw(self, above: int, seed: int) -> int:
        """A length greater than `above`. With sigma 0 a path beyond the mean ends with its next token."""
        if self.sigma == 0:
            return max(above + 1, math.ceil(self.mean))
        centre = math.log(self.mean) - self.sigma**2 / 2
        longer = _NORMAL.cdf((centre - math.log(above)) / self.sigma) if above else 1.0
        # Far beyond the mean the chance of being longer underflows, and the drawn chance with it.
        chance = max(rng.generator("length", seed).uniform(1e-12, 1 - 1e-12) * longer, 1e-300)
        # Rounded up, so that a response is longer than `above` exactly if the log-normal is.
        return max(above + 1, math.ceil(math.exp(centre - self.sigma * _NORMAL.inv_cdf(chance))))


class DrawnEnds:
    """`Ends` drawn once for each seed: a later request with the same seed has the same end."""

    def __init__(self, lengths: LogNormal) -> None:
        self._lengths = lengths
        self._ends: dict[int, int] = {}

    def __call__(self, request: GenerateRequest) -> int:
        if request.seed not in self._ends:
            above = len(request.context) - request.prompt_tokens
            self._ends[request.seed] = self._lengths.draw(above, request.seed)
        return self._ends[request.seed]


class InstantEngine:
    """Answers at once, with tokens that depend on the request's seed alone."""

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        tokens = np.random.default_rng(request.seed).integers(0, 2**16, request.max_tokens, dtype=np.int32)
        log_probs = np.zeros(request.max_tokens, dtype=np.float32)
        return GenerateOutput(tokens, log_probs, version=0, finish="length", cached_tokens=0)


class ForcedLengths:
    """An engine whose paths end where `ends` says. last_token: replaces a path's last token unless None."""

    def __init__(self, engine: Sampler, ends: Ends, last_token: int | None = None) -> None:
        self.engine = engine
        self._ends = ends
        self._last_token = last_token
        self.decoded_tokens = 0
        self.prefilled_tokens = 0

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        left = self._ends(request) - (len(request.context) - request.prompt_tokens)
        output = await self.engine.generate(replace(request, max_tokens=min(request.max_tokens, left)))
        self.decoded_tokens += len(output.tokens)
        self.prefilled_tokens += len(request.context) - output.cached_tokens
        if len(output.tokens) < left:
            return output
        if self._last_token is None:
            return replace(output, finish="eos")
        return replace(output, finish="eos", tokens=np.append(output.tokens[:-1], np.int32(self._last_token)))


def random_prompts(count: int, tokens: int, vocabulary: int) -> list[Prompt]:
    """Random prompts that share no prefix worth caching."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, vocabulary, size=(count, tokens), dtype=np.int32)
    return [Prompt(str(index), row, "", "", "") for index, row in enumerate(drawn)]
