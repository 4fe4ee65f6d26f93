"""Grading in processes that can be killed, so that no response can stop a run or disturb another's grade.

One thread a worker takes items from a common queue, sends them to its process and waits for the reply with
a deadline. A process that misses it, or dies, is killed with whatever it started and replaced; imports do
not count against the deadline. multiprocessing.Pool cannot do this: it has no way to kill one task.
"""

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from treepo.config.reward import RewardConfig
from treepo.errors import ConfigError
from treepo.rewards.grade import Grade, GradeItem
from treepo.rewards.process import Worker

_log = logging.getLogger(__name__)
_START_ATTEMPTS = 3


class PoolClosedError(RuntimeError):
    """The pool was closed before the item was graded."""


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
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = threading.Lock()  # of everything below
        self._workers: dict[int, Worker] = {}
        self._ready: list[Future[None]] = [Future() for _ in range(config.workers)]
        self._failure: Exception | None = None
        self._traceback_shown = False
        self.restarts = 0
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
        """One grade an item, in the same order. Raises ConfigError as `ready` does, and PoolClosedError."""
        tasks = [_Task(item) for item in items]
        with self._lock:
            if self._failure is not None:
                raise self._failure
            for task in tasks:
                self._tasks.put(task)
        return await asyncio.gather(*(asyncio.wrap_future(task.future) for task in tasks))

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are alive now."""
        with self._lock:
            return [worker.pid for worker in self._workers.values()]

    def close(self) -> None:
        """Kill every worker and wait until it is gone; what is not graded yet raises PoolClosedError."""
        self._fail(PoolClosedError("the reward pool is closed"))
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
        for _ in self._threads:
            self._tasks.put(None)

    def _run(self, slot: int) -> None:
        """One worker's thread."""
        worker: Worker | None = None
        ready = self._ready[slot]
        try:
            while self._failure is None:
                if worker is None:
                    worker = self._start(slot)
                    if not ready.done():
                        ready.set_result(None)
                task = self._tasks.get()
                if task is not None and task.future.set_running_or_notify_cancel():
                    worker = self._serve(slot, worker, task)
        except (ConfigError, PoolClosedError) as failure:
            self._fail(failure)
        finally:
            if worker is not None:
                self._discard(slot, worker)
