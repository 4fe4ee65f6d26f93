"""Keeps trees growing for training: starts prompts, grades finished trees, hands out the trees of a step.

`treepo.training.scheduler` decides; this module carries it out in the background, beside the trainer. In a
synchronous run trees start only while the loop waits for the next step's.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from treepo.config.run import RunConfig
from treepo.data.mixture import TrainingPrompts
from treepo.data.prompt_order import TrainingOrder
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.learning.dynamic_sampling import Dropped, uninformative
from treepo.protocols import EnginePool
from treepo.rewards.shaping import shaped
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.garbage import rare_collections
from treepo.rollout.router import LiveTree
from treepo.rollout.stats import Stats
from treepo.training.scheduler import Scheduler, ScheduleState
from treepo.training.tree_grader import TreeGrader
from treepo.tree import Tree
from treepo.watchdog import sampling, waiting


@dataclass(frozen=True, slots=True)
class FinishedTree:
    """A graded tree with the gold answer of its prompt."""

    tree: Tree
    answer: str


@dataclass(frozen=True, slots=True)
class Batch:
    """The trees of one step.

    sampled: all graded trees that were trained or dropped since the last step, in the order of their prompts.
    trained: the trees to learn from, rewards shaped. staleness: of each of those, in weight versions.
    dropped: the number of the others, by reason.
    """

    sampled: Sequence[FinishedTree]
    trained: Sequence[Tree]
    staleness: Sequence[int]
    dropped: Mapping[Dropped, int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the engines did since the last step.

    stats: the driver's counters. idle: share of the engines' time without work. seconds: in which sampling
    was not paused. growing, ready: trees now that are not trained, by whether they have finished.
    """

    stats: Stats
    idle: float
    seconds: float
    growing: int
    ready: int


class TreeSupply:
    """The trees of a training run. `running` keeps it going; errors of the background reach `batch`.

    finished: the trees that a resumed run begins with, by position; those that the scheduler has given up are
    left out.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: TrainingPrompts,
        order: TrainingOrder,
        scheduler: Scheduler,
        driver: TreeDriver,
        grader: TreeGrader,
        finished: Mapping[int, FinishedTree] | None = None,
    ) -> None:
        self._config, self._prompts, self._order = config, prompts, order
        self._dynamic = config.learning.dynamic_sampling
        self._scheduler, self._driver, self._grader = scheduler, driver, grader
        self._ahead: dict[int, Prompt] = {}  # prompts that were read together, by position
        finished = finished or {}
        self._finished = {position: finished[position] for position in scheduler.ready}
        self._dropped = {position: finished[position] for position in scheduler.dropped}  # no step's yet
        self._grown = 0
        self._failures = 0  # since the last tree that finished
        self._may_start = config.loop.mode == "async"
        self._changed = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self, engines: EnginePool) -> AsyncIterator[None]:
        """Let trees grow while the body runs; what is unfinished then is cancelled."""
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(lambda _: self._tell())
        try:
            with rare_collections(), sampling(self._driver, engines.engines):
                yield
        finally:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def batch(self, step: int) -> Batch:
        """Wait for the trees of a step. `trained` must follow before the next call.

        Raises EngineError if no tree can be sampled, RewardError if too few responses could be graded.
        """
        assert self._running is not None
        assert step == self._scheduler.version + 1
        self._may_start = True
        self._tell()
        self._raise_failure()
        with waiting("the step", self._awaited, lambda: self._grown):
            while (began := self._scheduler.take()) is None:
                await self._changed.wait()
                self._raise_failure()
        if self._config.loop.mode == "sync":
            self._may_start = False
        self._tell()
        self._grader.check(f"step {step}")
        return self._batch(began)

    def trained(self, decoded_tokens: int) -> None:
        """The trees of the last batch are trained, and the engines serve the new weights.

        decoded_tokens: by the engines, since the step before.
        """
        self._scheduler.trained(decoded_tokens)
        self._driver.forgive()
        self._tell()

    def state(self) -> tuple[ScheduleState, Mapping[int, FinishedTree]]:
        """What a checkpoint keeps: the schedule, and the finished trees that no step has taken or counted."""
        return self._scheduler.state(), self._finished | self._dropped

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The engines sample nothing while the body runs, and count as idle."""
        self._driver.idle.pause()
        try:
            yield
        finally:
            self._driver.idle.go_on()

    def take_sampled(self) -> Sampled:
        """What the engines did since the last call."""
        idle, seconds = self._driver.idle.take()
        schedule = self._scheduler
        return Sampled(self._driver.take_stats(), idle, seconds, schedule.growing, len(schedule.ready))

    def _batch(self, began: Mapping[int, int]) -> Batch:
        trees = {position: self._finished.pop(position) for position in began}
        sampled = sorted((trees | self._dropped).items())
        reasons = Counter(uninformative(one.tree) for one in self._dropped.values())
        self._dropped.clear()
        return Batch(
            sampled=[one for _, one in sampled],
            trained=[shaped(one.tree) for one in trees.values()],
            staleness=[self._scheduler.version - version for version in began.values()],
            dropped={reason: reasons[reason] for reason in Dropped} if self._dynamic else {},
        )

    def _awaited(self) -> str:
        ready, growing = len(self._scheduler.ready), self._scheduler.growing
        return f"trees: {ready} of {self._scheduler.batch} are ready, {growing} grow"

    def _tell(self) -> None:
        """Wake what waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _raise_failure(self) -> None:
        """Raise the error that ended the background, a fault of ours with its traceback."""
        assert self._running is not None
        if not self._running.done():
            return
        failure = self._running.exception()
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        assert failure is not None
        raise failure

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as growing:
            while True:
                position, prompt = await self._next()
                self._scheduler.start(position)
                live = self._driver.admit(prompt, self._scheduler.version + 1)
                growing.create_task(self._grow(position, prompt, live))

    async def _next(self) -> tuple[int, Prompt]:
        """Wait until a tree may start and an engine has room for it."""
        while True:
            changed = self._changed
            position = self._scheduler.next() if self._may_start else None
            if position is None:
                await changed.wait()
                continue
            prompt = self._prompt(position)
            with waiting(f"prompt {prompt.id}", "room on an engine", lambda: self._grown):
                await self._driver.wait_for_room(prompt)
            if self._may_start and self._scheduler.next() == position:
                return position, prompt

    async def _grow(self, position: int, prompt: Prompt, live: LiveTree) -> None:
        tree = await self._driver.grow(live)
        if isinstance(tree, FailedTree):
            self._failed(position, tree)
        else:
            finished = FinishedTree(await self._grader.grade(tree, prompt, live.tree.grades), prompt.answer)
            self._failures = 0
            self._grown += 1
            self._keep_or_drop(position, finished)
        self._tell()

    def _failed(self, position: int, tree: FailedTree) -> None:
        self._failures += 1
        if self._failures >= self._config.data.prompts_per_step:
            raise EngineError(f"no tree could be sampled; the last: {tree.reason}")
        self._scheduler.fail(position)

    def _keep_or_drop(self, position: int, finished: FinishedTree) -> None:
        if self._dynamic and uninformative(finished.tree) is not None:
            self._scheduler.drop(position)
            self._dropped[position] = finished
        else:
            self._scheduler.finish(position)
            self._finished[position] = finished

    def _prompt(self, position: int) -> Prompt:
        """The prompt at a position; those after it are read with it, which is cheaper."""
        if position not in self._ahead:
            positions = range(position, position + self._scheduler.batch)
            prompts = self._prompts.take([self._order.index(each) for each in positions])
            self._ahead = dict(zip(positions, prompts, strict=True))
        return self._ahead[position]
