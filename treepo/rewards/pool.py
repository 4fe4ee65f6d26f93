"""Grading in processes that can be killed, so that no response can stop a run or disturb another's grade.

One thread a worker takes items from a common queue, sends them to its process and waits for the reply with
a deadline. A process that misses it, or dies, is killed with whatever it started and replaced; imports do
not count against the deadline. multiprocessing.Pool cannot do this: it has no way to kill one task.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from treepo.config.reward import RewardConfig
from treepo.errors import ConfigError, RewardError
from treepo.rewards.grade import Grade, GradeItem
from treepo.rewards.process import Worker, WorkerDied
from treepo.tree import Verdict

_log = logging.getLogger(__name__)
_START_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    item: GradeItem
    future: Future[Grade] = field(default_factory=Future)


class RewardPool:
    """`config.workers` grading processes, started in the background by the constructor.

    Any number of coroutines of any number of event loops may grade at the same time. `restarts` counts the
    processes that were replaced.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()  # None ends one thread
        self._lock = threading.Lock()  # of everything below
        self._failure: Exception | None = None  # once set, nothing is queued, started or graded
        self._workers: dict[int, Worker] = {}
        self._traceback_shown = False
        self.restarts = 0
        self._ready: list[Future[None]] = [Future() for _ in range(config.workers)]
        for ready in self._ready:
            ready.set_running_or_notify_cancel()  # who stops waiting for it does not cancel it
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
        """One grade an item, in the same order. Raises ConfigError as `ready` does, and RewardError."""
        tasks = [_Task(item) for item in items]
        with self._lock:
            if self._failure is not None:
                raise self._failure
            for task in tasks:
                self._tasks.put(task)
        return await asyncio.gather(*(asyncio.wrap_future(task.future) for task in tasks))

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, those that are still starting included."""
        with self._lock:
            return [worker.pid for worker in self._workers.values()]

    def close(self) -> None:
        """Kill every worker and wait until it is gone; what is not graded yet raises RewardError."""
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
        """Grade nothing from now on: every waiting and later item raises `failure`."""
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
        """One worker's thread: start it, then serve items until None comes."""
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
        """A worker that is ready. Raises what the pool failed with, ConfigError and RewardError."""
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
        """Grade one item; returns the worker for the next one.

        A worker that dies may have been killed from outside, so the item is tried once more.
        """
        try:
            try:
                reply = worker.ask(task.item, self._config.deadline_seconds)
            except WorkerDied:
                worker = self._replace(slot)
                reply = worker.ask(task.item, self._config.deadline_seconds)
        except TimeoutError:
            message = f"not graded within {self._config.deadline_seconds:g} s"
            task.future.set_result(Grade(None, Verdict.TIMEOUT, message=message))
        except WorkerDied as death:
            task.future.set_result(Grade(None, Verdict.ERROR, message=str(death)))
        except Exception as failure:
            task.future.set_exception(failure)
            raise
        else:
            if reply.traceback is not None:
                self._show(reply.traceback)
            task.future.set_result(self._rewarded(reply.grade))
            if not reply.retire:
                return worker
        return self._replace(slot)

    def _replace(self, slot: int) -> Worker:
        with self._lock:
            self.restarts += 1
        return self._start(slot)

    def _show(self, trace: str) -> None:
        """Log a grader's traceback, the first one only: a faulty function fails on every response."""
        with self._lock:
            shown, self._traceback_shown = self._traceback_shown, True
        if not shown:
            _log.error("the grader raised (shown once, counted as verdict `error`):\n%s", trace)

    def _rewarded(self, grade: Grade) -> Grade:
        if grade.reward is not None or not grade.verdict.graded:
            return grade
        correct = grade.verdict is Verdict.CORRECT
        return replace(grade, reward=self._config.correct if correct else self._config.wrong)
