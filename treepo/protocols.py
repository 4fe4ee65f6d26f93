"""The interfaces through which the core meets engines and the trainer.

`treepo.cluster` implements these protocols with SGLang and Megatron-Core in Ray actors; the tests implement
them with fakes. Arrays are numpy arrays: they cross processes, and neither side depends on the other's
device.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from treepo.learning.mismatch import LogProbMismatch
from treepo.learning.packing import Pack
from treepo.learning.soundness import WeightCheck


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """A request for at most `max_tokens` more tokens of one path.

    context: int32 [T], the prompt and every segment above, as the tree shows them.
    prompt_tokens: length of the prompt in `context`; the rest is the response so far.
    check_every: if not 0, decoding ends at the first multiple of this number of new tokens at which the
        engine's stop rule holds for the response so far (prompt excluded).
    seed: used by engines that sample reproducibly, ignored by others.
    top_p, top_k, min_p: leave unlikely tokens out (docs/sampling.md); the defaults leave out none.
    routes_from: the first token of `context` whose route is returned; None: no routes are returned.
    """

    context: np.ndarray
    prompt_tokens: int
    max_tokens: int
    temperature: float
    seed: int
    check_every: int = 0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    routes_from: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GenerateOutput:
    """The tokens sampled for a request: at least one.

    log_probs: float32 [T], under the sampling distribution (temperature applied), before tokens are left out.
    version: the committed weight version that sampled all of them.
    finish: `eos` if the last token is an end token of the model; `length` after `max_tokens` tokens, or at a
    boundary of `check_every` where the stop rule holds; `interrupted` if the engine stopped anywhere else,
    because a weight sync began or the pool held its requests: the rest is another request.
    cached_tokens: number of context tokens that were in the prefix cache and not computed on behalf of this
    request.
    routes: of the context from `routes_from` on, then of `tokens` but the last, which nothing has read yet
    (`treepo.routes`); None if none were asked for. Those of `tokens` are the choices of the computation that
    sampled them; those of cached context tokens, of the computation that filled the cache.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    version: int
    finish: Literal["eos", "length", "interrupted"]
    cached_tokens: int
    routes: np.ndarray | None = None


class Sampler(Protocol):
    """Continues a path. Raises `treepo.errors.EngineError` for a request that it cannot serve."""

    async def generate(self, request: GenerateRequest) -> GenerateOutput: ...


class Engine(Sampler, Protocol):
    """An engine of a pool. It keeps its name when its process is replaced."""

    @property
    def name(self) -> str:
        """For errors and the log: `engine 0`."""
        ...

    @property
    def status(self) -> str:
        """`serving`, or why it does not serve: `starting`, `down: its process ended`, `given up: ...`."""
        ...


class EnginePool(Protocol):
    """The engines of a command. Losing one loses no request: the driver repeats it on another engine."""

    @property
    def engines(self) -> Sequence[Engine]: ...

    @property
    def kv_tokens(self) -> Sequence[int] | None:
        """Tokens in each engine's KV cache, in the order of `engines`; None if a server reports none."""
        ...


class TrainingEnginePool(EnginePool, Protocol):
    """The engines of a training run, which serve the trainer's weights."""

    def training(self) -> AbstractAsyncContextManager[None]:
        """Let the trainer compute and change its weights while the body runs.

        In a synchronous loop the engines are held meanwhile: running requests are interrupted, and later ones
        wait. If engines and trainer share devices, the engines also give their memory to the trainer. In an
        asynchronous loop sampling goes on until `sync_weights`. A restarted engine takes weights only after
        the body has ended.
        """
        ...

    def restarted_trainer(self) -> AbstractAsyncContextManager[None]:
        """As `training`, after the trainer was lost (LostTrainerError): it is started again with the model
        folder's weights, and the body loads others and syncs them. The engines stay up.
        """
        ...

    async def sync_weights(self, version: int) -> None:
        """Make every serving engine serve the trainer's weights as `version`. Only inside `training` or
        `restarted_trainer`.

        An engine that fails is replaced. An engine that is restarted later takes the trainer's weights of
        that version before it serves.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MiniBatch:
    """The packs of one optimizer step.

    packs: one sequence for each data-parallel replica. denominator: `treepo.learning.loss.denominator` of all
    packs, by which the summed loss is divided; above 0.
    """

    packs: Sequence[Sequence[Pack]]
    denominator: float


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What the trainer measured while it learned from a batch.

    updates: metrics of each optimizer step, in order; those whose `grad_norm` is not finite changed nothing.
    mismatch: of the whole batch, before the first optimizer step. seconds: time of the phases `log_probs` and
    `train`. weights: of the trainer afterwards; None if no optimizer step was taken. own_choice_differs: the
    share of (token, layer) pairs with a replayed route whose router would have chosen another set of experts:
    before the first optimizer step with `trainer.routing_replay: rollout`, while training with `trainer`;
    None without replay.
    """

    updates: Sequence[Mapping[str, float]]
    mismatch: LogProbMismatch
    seconds: Mapping[str, float]
    weights: WeightCheck | None = None
    own_choice_differs: float | None = None

    @property
    def taken(self) -> list[Mapping[str, float]]:
        """The metrics of the optimizer steps that changed the weights."""
        return [update for update in self.updates if was_taken(update)]

    @property
    def skipped(self) -> int:
        """Optimizer steps whose loss or gradient was not finite, and that changed nothing."""
        return len(self.updates) - len(self.taken)


def was_taken(update: Mapping[str, float]) -> bool:
    """Whether the optimizer step with these metrics changed the weights."""
    return math.isfinite(update["grad_norm"])


class Trainer(Protocol):
    """All ranks of the trainer. If one dies or hangs, this and every later call raise LostTrainerError until
    `TrainingEnginePool.restarted_trainer`; TrainerMemoryError if it ran out of memory.
    """

    @property
    def dtype(self) -> str:
        """Data type of the model's parameters: "float32" or "bfloat16"."""
        ...

    async def log_probs(self, packs: Sequence[Sequence[Pack]], temperature: float) -> list[list[np.ndarray]]:
        """Compute each token's log-prob given its path.

        Returns float32 [T] for each pack of each replica, 0 if `source` is -1.
        """
        ...

    async def reference_log_probs(
        self, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]:
        """As `log_probs`, under the weights that training began with; needs `learning.kl_coefficient`."""
        ...

    async def train_batch(self, mini_batches: Sequence[MiniBatch], temperature: float) -> BatchResult:
        """Take one optimizer step for each mini-batch.

        The ranks first compute the log-probs of the whole batch under the current weights, and under the
        reference weights if the loss has a KL term. An optimizer step whose loss or gradient is not finite
        changes nothing.
        """
        ...

    async def save(self, folder: Path, run: Mapping[str, Any], ready_trees: bytes) -> None:
        """Begin a training checkpoint that holds `run` and the file of ready trees too; return once the state
        is copied. Raises CheckpointError.
        """
        ...

    async def save_written(self) -> bool:
        """Whether `finish_save` would not wait for the disk."""
        ...

    async def finish_save(self) -> None:
        """Wait until the checkpoint that was begun is complete on disk. Raises CheckpointError."""
        ...

    async def load(self, folder: Path) -> None:
        """Restore weights and optimizer from a training checkpoint of any layout. Raises ModelError."""
        ...

    async def export(self, folder: Path) -> None:
        """Write a Hugging Face folder of the current weights. Raises CheckpointError or ModelError."""
        ...
