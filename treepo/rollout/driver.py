"""The tree driver: grows many trees at once on a few engines. No tree waits for another.

Each tree is a task of its own; `growing_tree` has its rules. It stays on the engine that holds its prefixes
and moves only if that engine keeps failing its requests. A new tree goes to the engine with the fewest leaves
to come, and to an engine that fails its requests only if no other has room. The content of a tree depends on
(seed, step, prompt id) and on the engine's answers, never on the order of the answers.

If policies read rewards, each response is graded in the background as soon as its path has ended. A tree
waits for its grades when it falls back, and no other tree does.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.errors import DeadEngineError, EngineError
from treepo.protocols import Sampler
from treepo.rewards.grade import Grade
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.idle_clock import IdleClock
from treepo.rollout.path import PathRequest
from treepo.rollout.router import LiveTree, Router
from treepo.rollout.stats import Stats
from treepo.rollout.stopping import StopRule
from treepo.tree import Tree

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FailedTree:
    """A tree that was given up: one of its requests failed at every attempt that the configuration allows."""

    prompt_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request that has not been answered yet.

    number: of the path request, unique in the tree. engine: its index. seconds: since the request was sent.
    """

    prompt_id: str
    number: int
    engine: int
    seconds: float


GradeResponse = Callable[[Prompt, np.ndarray], Coroutine[Any, Any, Grade]]
"""Grades one response to a prompt, int32 [T]."""


class TreeDriver:
    """Samples trees (or, in `sequential` mode, independent responses) for prompts.

    decode: token ids to text, for the stop rules. kv_tokens: tokens in the KV cache, one number for all
    engines or one for each. It bounds the trees that live on an engine, so that their prefixes are not
    evicted. None: unbounded. `sampling.max_live_trees` bounds them by number instead. One driver serves all
    steps: it learns from finished trees how large trees become. grade: called for each response if the
    policies read rewards, and otherwise never; those policies need it. routes: whether the engines are asked
    for the routes of a tree's tokens.
    """

    def __init__(
        self,
        engines: Sequence[Sampler],
        sampling: SamplingConfig,
        decode: Callable[[np.ndarray], str],
        seed: int,
        kv_tokens: int | Sequence[int] | None = None,
        grade: GradeResponse | None = None,
        *,
        routes: bool = False,
    ) -> None:
        if not engines:
            raise ValueError("a driver needs at least one engine")
        if sampling.reads_rewards and grade is None:
            raise ValueError(
                f"{', '.join(sampling.reads_rewards)}: a driver needs a grader for these policies"
            )
        self.stats = Stats()
        self.idle = IdleClock(len(engines))
        self._sampling = sampling
        self._rule = StopRule(sampling, decode)
        self._seed = seed
        self._grade = grade if sampling.reads_rewards else None
        self._routes = routes
        self._router = Router(
            engines, sampling, [kv_tokens] * len(engines) if isinstance(kv_tokens, int) else kv_tokens
        )
        self._room = asyncio.Event()
        self._pending: dict[PathRequest, tuple[str, int, float]] = {}  # prompt id, engine, sent at

    async def wait_for_room(self, prompt: Prompt) -> None:
        """Return once an engine has room for the prompt's tree."""
        while self._router.engine_with_room(len(prompt.tokens)) is None:
            self._room.clear()
            await self._room.wait()

    def admit(self, prompt: Prompt, step: int) -> LiveTree:
        """Admit the prompt's tree to an engine, which must have room; `grow` must follow."""
        engine = self._router.engine_with_room(len(prompt.tokens))
        assert engine is not None
        tree = GrowingTree(prompt, self._sampling, self._rule, self._seed, step, routes=self._routes)
        return self._router.admit(tree, engine)

    async def grow(self, live: LiveTree) -> Tree | FailedTree:
        """Grow an admitted tree. If a request of it keeps failing, the result is a FailedTree.

        Raises what the grader raises.
        """
        try:
            return await self._grow(live)
        finally:
            for grading in live.grading.values():
                grading.cancel()

    async def _grow(self, live: LiveTree) -> Tree | FailedTree:
        tree, failure = live.tree, None
        try:
            while tree.path_requests and failure is None:
                try:
                    async with asyncio.TaskGroup() as paths:
                        for path in tree.path_requests:
                            paths.create_task(self._complete(live, path))
                except* EngineError as errors:
                    failure = errors.exceptions[0]
                else:
                    self._router.round_ended(live)
                    if tree.wants_grades:
                        await _take_grades(live)
                    tree.advance()
        finally:
            self._router.remove(live)
            self._room.set()
        if failure is not None:
            self.stats.failed_trees += 1
            _log.warning("prompt %s: tree given up: %s", tree.prompt.id, failure)
            return FailedTree(tree.prompt.id, str(failure))
        self._router.tree_finished(live)
        await _take_grades(live)
        finished = tree.finished()
        self.stats.count_tree(finished, tree.branchings, tree.fallbacks, tree.pruned_tokens)
        return finished

    async def sample(self, prompts: Iterable[Prompt], step: int) -> AsyncGenerator[Tree | FailedTree]:
        """Yield the tree of each prompt as soon as it is finished. At most one call at a time.

        `prompts` may be lazy: it is advanced only when an engine has room. Closing the iterator
        (`contextlib.aclosing`) cancels everything in flight.
        """
        self.forgive()
        results: asyncio.Queue[Tree | FailedTree | None] = asyncio.Queue()
        growing = asyncio.create_task(self._grow_all(prompts, step, results))
        try:
            while (result := await results.get()) is not None:
                yield result
            await growing
        finally:
            growing.cancel()
            await asyncio.gather(growing, return_exceptions=True)

    def forgive(self) -> None:
        """Forget which engines have failed: those may have been replaced."""
        for engine in self._router.engines:
            engine.failures = 0

    def take_stats(self) -> Stats:
        """Return the counters and start new ones from 0."""
        taken, self.stats = self.stats, Stats()
        return taken

    def expected_tree_tokens(self, prompt_tokens: int) -> int:
        """KV tokens that a new tree is expected to hold, judging by the trees so far."""
        return self._router.expected_tree_tokens(prompt_tokens)

    @property
    def waits(self) -> bool:
        """Whether a request has not been answered yet."""
        return bool(self._pending)

    def pending(self) -> list[PendingRequest]:
        """Requests in flight, the oldest first."""
        now = time.monotonic()
        return [
            PendingRequest(prompt_id, path.number, engine, now - since)
            for path, (prompt_id, engine, since) in self._pending.items()
        ]

    async def _grow_all(
        self, prompts: Iterable[Prompt], step: int, results: asyncio.Queue[Tree | FailedTree | None]
    ) -> None:
        async def report(live: LiveTree) -> None:
            results.put_nowait(await self.grow(live))

        try:
            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    await self.wait_for_room(prompt)
                    group.create_task(report(self.admit(prompt, step)))
        finally:
            results.put_nowait(None)

    async def _complete(self, live: LiveTree, path: PathRequest) -> None:
        while not path.complete:
            await self._generate(live, path)
        if path.stop is not None:
            self._router.leaf_ended(live)
            self._room.set()
            if self._grade is not None:
                prompt = live.tree.prompt
                response = path.context[len(prompt.tokens) :]
                live.grading[path] = asyncio.create_task(self._grade(prompt, response))

    async def _generate(self, live: LiveTree, path: PathRequest) -> None:
        """Send one request for `path`, and retry it if it fails.

        From the second failure on the tree moves to another engine; if its engine is dead, it moves at once.
        """
        request = live.tree.generate_request(path)
        below_prompt = path.last_node is None
        attempts = self._sampling.attempts
        for attempt in range(1, attempts + 1):
            home = live.home
            self._pending[path] = live.tree.prompt.id, home.index, time.monotonic()
            self.idle.begin(home.index)
            try:
                output = await home.engine.generate(request)
                taken = live.tree.receive(path, output)
            except EngineError as error:
                self.stats.failed_requests += 1
                home.failures += 1
                _log.info("prompt %s: attempt %d of %d: %s", live.tree.prompt.id, attempt, attempts, error)
                if attempt == attempts:
                    raise EngineError(f"{error} (attempt {attempt} of {attempts})") from error
                await asyncio.sleep(self._sampling.retry_seconds * 2 ** (attempt - 1))
                dead = isinstance(error, DeadEngineError)
                if (dead or attempt > 1) and live.home is home:
                    self._router.move(live)
            else:
                home.failures = 0
                self._router.count_tokens(taken)
                self.stats.count_request(request, output, taken, below_prompt)
                return
            finally:
                del self._pending[path]
                self.idle.end(home.index)


async def _take_grades(live: LiveTree) -> None:
    """Wait for the grades of the tree's responses, and give them to the tree."""
    grades = await asyncio.gather(*live.grading.values())
    for path, grade in zip(live.grading, grades, strict=True):
        live.tree.grade(path, grade)
    live.grading.clear()
