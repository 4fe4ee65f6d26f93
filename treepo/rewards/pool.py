"""Grade in processes that can be killed, so that no response stops a run or disturbs another's grade.

Each worker has a thread that takes items from a common queue, sends them to its process and waits for the
reply with a deadline. A process that misses the deadline or dies is killed with its children and replaced;
imports do not count against the deadline. (multiprocessing.Pool has no way to kill one task.)
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from treepo.config.reward import RewardConfig
from treepo.errors import ConfigError, RewardError
from treepo.rewards.grade import Grade, GradeItem, Rewards
from treepo.rewards.process import Worker, WorkerDied
from treepo.verdict import Verdict

_log = logging.getLogger(__name__)
_START_ATTEMPTS = 3


@asynccontextmanager
async def open_rewards(config: RewardConfig) -> AsyncIterator[Rewards]:
    """Open the grader that `config` asks for, a pool or an endpoint, and yield it when it is ready.

    Raises ConfigError if a function cannot be imported or an endpoint does not answer.
    """
    if config.url is None:
        with RewardPool(config) as pool:
            await pool.ready()
            yield pool
        return
    from treepo.rewards.endpoint import HttpRewards  # here: it takes a quarter of a second to import

    async with HttpRewards(config) as rewards:
        await rewards.ready()
        yield rewards


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    item: GradeItem
    future: Future[Grade] = field(default_factory=Future)


class RewardPool:
    """`config.workers` grading processes, which the constructor starts in the background.

    Coroutines of any number of event loops may grade at the same time. `restarts` counts the processes that
    were replaced.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()  # None ends one thread
        self._lock = threading.Lock()  # guards everything below
        self._failure: Exception | None = None  # once set, nothing more is queued, started or graded
        self._workers: dict[int, Worker] = {}
        self._failure_shown = self._unconfined_shown = False
        self.restarts = 0
        self._ready: list[Future[None]] = [Future() for _ in range(config.workers)]
        for ready in self._ready:
            ready.set_running_or_notify_cancel()  # a caller that stops waiting does not cancel it
        self._threads = [
            threading.Thread(target=self._run, args=(slot,), name=f"reward-{slot}", daemon=True)
            for slot in range(config.workers)
        ]
        for thread in self._threads:
            thread.start()

    async def ready(self) -> None:
        """Wait until every worker can grade. Raises ConfigError if the reward function cannot be imported."""
        await asyncio.gather(*map(asyncio.wrap_future, self._ready))

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """Grade the items, in the same order. Raises ConfigError as `ready` does, and RewardError."""
        tasks = [_Task(replace(item, extraction=item.extraction or self._config.answer)) for item in items]
        with self._lock:
            if self._failure is not None:
                raise self._failure
            for task in tasks:
                self._tasks.put(task)
        return await asyncio.gather(*(asyncio.wrap_future(task.future) for task in tasks))

    def worker_pids(self) -> list[int]:
        """Process ids of the workers' keepers, starting ones included."""
        with self._lock:
            return [worker.pid for worker in self._workers.values()]

    def close(self) -> None:
        """Kill every worker and wait until it is gone; items not yet graded raise RewardError."""
        self._fail(RewardError("the reward pool is closed"))
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fail(self, failure: Exception) -> None:
        """Stop grading: every waiting and every later item raises `failure`."""
        with self._lock:
            self._failure = self._failure or failure
            for worker in self._workers.values():
                worker.stop()
            with contextlib.suppress(Empty):
                while True:
                    task = self._tasks.get_nowait()
                    if task is not None and task.future.set_running_or_notify_cancel():
                        task.future.set_exception(self._failure)
            for _ in self._threads:
                self._tasks.put(None)

    def _run(self, slot: int) -> None:
        """Run one worker's thread: start the worker, then serve items until None comes."""
        try:
            worker = self._start(slot)
            self._ready[slot].set_result(None)
            while (task := self._tasks.get()) is not None:
                if task.future.set_running_or_notify_cancel():
                    worker = self._serve(slot, worker, task)
        except Exception as failure:  # a thread that died silently would leave its callers waiting
            self._fail(failure)
            if not self._ready[slot].done():
                self._ready[slot].set_exception(failure)
        finally:
            self._discard(slot)

    def _start(self, slot: int) -> Worker:
        """Start a worker that is ready to grade. Raises ConfigError, RewardError or the pool's failure."""
        reason: Exception | None = None
        for _ in range(_START_ATTEMPTS):
            self._discard(slot)
            with self._lock:
                if self._failure is not None:
                    raise self._failure
                worker = self._workers[slot] = Worker(self._config)
            try:
                ready = worker.wait_ready()
            except (TimeoutError, WorkerDied) as error:
                reason = error
                continue
            if ready.failure is None:
                self._warn_of(ready.unconfined)
                return worker
            self._show(ready.failure)
            last_line = ready.failure.strip().splitlines()[-1]
            raise ConfigError(f"reward.function = {self._config.function}: it cannot be loaded: {last_line}")
        raise RewardError(f"no grading process started in {_START_ATTEMPTS} attempts: {reason!r}")

    def _discard(self, slot: int) -> None:
        with self._lock:
            worker = self._workers.pop(slot, None)
        if worker is not None:
            worker.close()

    def _serve(self, slot: int, worker: Worker, task: _Task) -> Worker:
        """Grade one item; return the worker for the next one.

        A dead worker may have been killed from outside, so its item is tried once more.
        """
        try:
            try:
                reply = worker.grade(task.item, self._config.deadline_seconds)
            except WorkerDied:
                worker = self._replace(slot)
                reply = worker.grade(task.item, self._config.deadline_seconds)
        except TimeoutError:
            late = f"not graded within {self._config.deadline_seconds:g} s"
            task.future.set_result(self._named(Grade(None, Verdict.TIMEOUT, message=late)))
        except WorkerDied as death:
            task.future.set_result(self._named(Grade(None, Verdict.ERROR, message=str(death))))
        except Exception as failure:
            task.future.set_exception(failure)
            raise
        else:
            grade = self._named(reply.grade)
            if reply.traceback is not None or self._config.function is not None:
                self._show(reply.traceback or grade.message)
            task.future.set_result(self._rewarded(grade))
            if not reply.retire:
                return worker
        return self._replace(slot)

    def _replace(self, slot: int) -> Worker:
        with self._lock:
            self.restarts += 1
        return self._start(slot)

    def _named(self, grade: Grade) -> Grade:
        """The grade, the reward function's name in its message."""
        if grade.message is None or self._config.function is None:
            return grade
        return replace(grade, message=f"reward.function = {self._config.function}: {grade.message}")

    def _show(self, failure: str | None) -> None:
        """Log the first failure only, a traceback or a message: a faulty function fails on every response."""
        if failure is None:
            return
        with self._lock:
            shown, self._failure_shown = self._failure_shown, True
        if not shown:
            _log.error("the grader failed (shown once, counted as verdict `error`):\n%s", failure)

    def _warn_of(self, unconfined: Sequence[str]) -> None:
        """Log once what does not confine the grading processes, which are all alike."""
        with self._lock:
            shown, self._unconfined_shown = self._unconfined_shown, True
        if unconfined and not shown:
            _log.warning(
                "this kernel does not confine grading processes by %s: Python's audit hook alone holds "
                "there, which code that already runs in Python can get around",
                " and ".join(unconfined),
            )

    def _rewarded(self, grade: Grade) -> Grade:
        if grade.reward is not None or not grade.verdict.graded:
            return grade
        correct = grade.verdict is Verdict.CORRECT
        return replace(grade, reward=self._config.correct if correct else self._config.wrong)
