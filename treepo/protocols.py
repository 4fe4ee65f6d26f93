"""What the core asks of an engine and a trainer, so that it never needs to know which one it has.

The real ones live in `sglang_rollout` and `megatron_bridge`; the tests bring fakes. Arrays are numpy on
this border: it is crossed between processes, and neither side should care about the other's device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from treepo.learning.packing import Pack
from treepo.weight_sync.wire import Address, Bucket, Manifest


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """One path asks for at most `max_tokens` more tokens.

    context: int32 [T], the prompt and every segment above, as the tree shows them.
    prompt_tokens: how many of `context` are the prompt; the rest is the response so far.
    check_every: where not 0, decoding ends at the first multiple of this many new tokens at which the
        engine's stop rule holds for the response so far (prompt excluded).
    seed: used by an engine that samples deterministically, ignored by others.
    """

    context: np.ndarray
    prompt_tokens: int
    max_tokens: int
    temperature: float
    seed: int
    check_every: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class GenerateOutput:
    """Tokens sampled under the request's context: at least one.

    log_probs: float32 [T], under the sampling distribution (temperature applied).
    version: the committed weight version that sampled all of them.
    finish: `eos` when the last token is one of the model's end tokens, `length` otherwise.
    cached_tokens: how many of the context's tokens were found in the prefix cache.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    version: int
    finish: Literal["eos", "length"]
    cached_tokens: int


class Sampler(Protocol):
    """Continues a path. Raises `treepo.errors.EngineError` for a request that it cannot serve."""

    async def generate(self, request: GenerateRequest) -> GenerateOutput: ...


class Engine(Sampler, Protocol):
    """An engine of a pool; it keeps its name when its process is replaced."""

    @property
    def name(self) -> str:
        """For errors and the log: `engine 0`."""
        ...

    @property
    def status(self) -> str:
        """`serving`, or why it does not serve: `starting`, `down: its process ended`, `given up: ...`."""
        ...


class WeightSource(Protocol):
    """The trainer's side of a weight update. Both are the same on every rank, and collective."""

    def manifest(self) -> Manifest:
        """All tensors of the model, in the order of `tensors`."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each of them under its Hugging Face name, on rank 0; nothing on the others, which must iterate."""
        ...


class WeightSink(Protocol):
    """An engine's side. Between `begin` and `commit` or `abort` it serves nothing."""

    async def begin(self, version: int, manifest: Manifest) -> None: ...

    async def join(self, address: Address) -> None: ...

    async def load(self, bucket: Bucket) -> None: ...

    async def commit(self) -> int:
        """Verify that everything arrived; serve the new version from here on and return it."""
        ...

    def abort(self, reason: str) -> None:
        """There will be no commit: serve the old version if it is whole, else nothing."""
        ...


class Trainer(Protocol):
    """One rank of the trainer. Every method is collective; `packs` are those of the rank's replica."""

    def log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        """For every pack float32 [T]: each token's log-prob given its path, 0 where `source` is -1."""
        ...

    def train_step(self, packs: Sequence[Pack], temperature: float, denominator: float) -> dict[str, float]:
        """One optimizer step on the loss summed over all replicas' packs and divided by `denominator`.

        Returns the metrics of `treepo.learning.loss` and of the step.
        """
        ...
