"""The tree driver: grows many trees on a few engines, none waiting for another.

Each tree is a task of its own (`growing_tree` has its rules). It stays on the engine that holds its
prefixes, and moves only when that engine keeps failing its requests; a new tree goes to the engine with
the fewest leaves outstanding, and to one that fails only where no other has room. What trees contain depends
on (seed, step, prompt id) and on what the engine answers, never on the order in which answers come back.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.errors import DeadEngineError, EngineError
from treepo.protocols import Engine, GenerateOutput, GenerateRequest
from treepo.rollout.growing_tree import Ask, GrowingTree
from treepo.rollout.router import Lane, Lanes, LiveTree
from treepo.rollout.stopping import StopRule
from treepo.tree import Tree

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FailedTree:
    """A tree that could not go on, after every attempt that the configuration allows."""

    prompt_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has not come back. ask: its number in its tree, in the order of asking."""

    prompt_id: str
    ask: int
    engine: int
    seconds: float


@dataclass(slots=True)
class Stats:
    """Sums since the driver was made or they were last taken."""

    trees: int = 0
    failed_trees: int = 0
    leaves: int = 0
    branchings: int = 0  # paths that were given more than one child
    fallbacks: int = 0  # times that a tree ran out of active paths before it had its leaves
    requests: int = 0
    failed_requests: int = 0
    decoded_tokens: int = 0
    dropped_tokens: int = 0  # decoded past the boundary at which the path ended
    total_tokens: int = 0  # of all responses, a shared token once for each
    prompt_tokens: int = 0  # contexts of all requests
    cached_tokens: int = 0  # of those, found in the prefix cache
    continuation_tokens: int = 0  # contexts of requests below a segment; the last token of each is left
    continuation_cached_tokens: int = 0  # out, because an engine always computes that one

    @property
    def cached_token_ratio(self) -> float:
        """Share of the continuations' reusable context that was found in the prefix cache."""
        return self.continuation_cached_tokens / max(self.continuation_tokens, 1)

    @property
    def total_over_unique(self) -> float:
        """Tokens that independent samples of the same responses decode, over those decoded here."""
        return self.total_tokens / max(self.decoded_tokens - self.dropped_tokens, 1)


class TreeDriver:
    """Samples trees (or, in `sequential` mode, independent responses) for prompts.

    decode: token ids to text, for the stop rules. kv_tokens: tokens that every engine's KV cache holds, or
    each one's in a sequence; where given, they bound the trees that live on an engine so that their prefixes
    are not evicted. `sampling.max_live_trees` bounds them by number instead. One driver serves step after
    step, and knows better each time how large trees become.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        sampling: SamplingConfig,
        decode: Callable[[np.ndarray], str],
        seed: int,
        kv_tokens: int | Sequence[int] | None = None,
    ) -> None:
        if not engines:
            raise ValueError("a driver needs at least one engine")
        self.stats = Stats()
        self._sampling = sampling
        self._rule = StopRule(sampling, decode)
        self._seed = seed
        self._lanes = Lanes(
            engines, sampling, [kv_tokens] * len(engines) if isinstance(kv_tokens, int) else kv_tokens
        )
        self._room = asyncio.Event()
        self._waiting: dict[Ask, tuple[str, int, float]] = {}

    async def sample(self, prompts: Iterable[Prompt], step: int) -> AsyncGenerator[Tree | FailedTree]:
        """Trees in the order in which they are finished, each prompt once; at most one call at a time.

        `prompts` may be lazy: they are taken one by one as engines have room. Closing the iterator
        (`contextlib.aclosing`) cancels whatever is in flight. What is raised here, in a group, is a fault;
        an engine's failures end in a FailedTree.
        """
        for lane in self._lanes.lanes:
            lane.failures = 0  # an engine that failed in the last step may have been replaced
        results: asyncio.Queue[Tree | FailedTree | None] = asyncio.Queue()
        growing = asyncio.create_task(self._grow_all(prompts, step, results))
        try:
            while (result := await results.get()) is not None:
                yield result
            await growing
        finally:
            growing.cancel()
            await asyncio.wait([growing])

    def take_stats(self) -> Stats:
        """The sums since the last call, which start again from 0."""
        taken, self.stats = self.stats, Stats()
        return taken

    def room_of_a_tree(self, prompt_tokens: int) -> int:
        """KV tokens that a new tree is given room for, by what this driver knows of trees so far."""
        return self._lanes.room_of_a_tree(prompt_tokens)

    def waiting(self) -> list[Waiting]:
        """Requests in flight, the oldest first."""
        now = time.monotonic()
        return [
            Waiting(prompt_id, ask.number, engine, now - since)
            for ask, (prompt_id, engine, since) in self._waiting.items()
        ]

    async def _grow_all(
        self, prompts: Iterable[Prompt], step: int, results: asyncio.Queue[Tree | FailedTree | None]
    ) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    lane = await self._lane_with_room(prompt)
                    tree = GrowingTree(prompt, self._sampling, self._rule, self._seed, step)
                    group.create_task(self._grow(self._lanes.seat(tree, lane), results))
        finally:
            results.put_nowait(None)

    async def _grow(self, live: LiveTree, results: asyncio.Queue[Tree | FailedTree | None]) -> None:
        tree, failure = live.tree, None
        try:
            while tree.asks and failure is None:
                try:
                    async with asyncio.TaskGroup() as paths:
                        for ask in tree.asks:
                            paths.create_task(self._complete(live, ask))
                except* EngineError as errors:
                    failure = errors.exceptions[0]
                else:
                    self._lanes.round_ended(live)
                    tree.advance()
        finally:
            self._lanes.leave(live)
            self._room.set()
        if failure is not None:
            self.stats.failed_trees += 1
            _log.warning("prompt %s: tree given up: %s", tree.prompt.id, failure)
            results.put_nowait(FailedTree(tree.prompt.id, str(failure)))
            return
        self._lanes.finished(live)
        finished = tree.finished()
        self._count_tree(finished, tree)
        results.put_nowait(finished)

    async def _complete(self, live: LiveTree, ask: Ask) -> None:
        while not ask.complete:
            await self._answer(live, ask)
        if ask.stop is not None:
            self._lanes.leaf_ended(live)
            self._room.set()

    async def _answer(self, live: LiveTree, ask: Ask) -> None:
        """One request for `ask`, tried again while it fails: elsewhere from the second failure on, and as
        soon as the engine is dead.
        """
        request = live.tree.request(ask)
        below_prompt = ask.tip is None
        attempts = self._sampling.attempts
        for attempt in range(1, attempts + 1):
            lane = live.lane
            self._waiting[ask] = live.tree.prompt.id, lane.index, time.monotonic()
            try:
                output = await lane.engine.generate(request)
                taken = live.tree.receive(ask, output)
            except EngineError as error:
                self.stats.failed_requests += 1
                lane.failures += 1
                _log.info("prompt %s: attempt %d of %d: %s", live.tree.prompt.id, attempt, attempts, error)
                if attempt == attempts:
                    raise EngineError(f"{error} (attempt {attempt} of {attempts})") from error
                await asyncio.sleep(self._sampling.retry_seconds * 2 ** (attempt - 1))
                dead = isinstance(error, DeadEngineError)
                if (dead or attempt > 1) and live.lane is lane:
                    self._lanes.move(live)
            else:
                lane.failures = 0
                self._lanes.took(taken)
                self._count_request(request, output, taken, below_prompt)
                return
            finally:
                del self._waiting[ask]

    async def _lane_with_room(self, prompt: Prompt) -> Lane:
        while (lane := self._lanes.with_room(len(prompt.tokens))) is None:
            self._room.clear()
            await self._room.wait()
        return lane

    def _count_request(
        self, request: GenerateRequest, output: GenerateOutput, taken: int, below_prompt: bool
    ) -> None:
        stats, context_tokens = self.stats, len(request.context)
        stats.requests += 1
        stats.decoded_tokens += len(output.tokens)
        stats.dropped_tokens += len(output.tokens) - taken
        stats.prompt_tokens += context_tokens
        stats.cached_tokens += output.cached_tokens
        if not below_prompt:
            stats.continuation_tokens += context_tokens - 1
            stats.continuation_cached_tokens += output.cached_tokens

    def _count_tree(self, tree: Tree, growing: GrowingTree) -> None:
        self.stats.trees += 1
        self.stats.leaves += len(tree.leaves)
        self.stats.total_tokens += tree.total_tokens()
        self.stats.branchings += growing.branchings
        self.stats.fallbacks += growing.fallbacks
