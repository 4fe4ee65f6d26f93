"""All engines of a run, and what holds for them together: who serves, and how many more may be started."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal

from treepo.cluster.supervised_engine import EngineProcess, State, SupervisedEngine
from treepo.config.engine import EngineConfig
from treepo.errors import DeadEngineError, EngineError, NoEngineError

_log = logging.getLogger(__name__)


class Fleet[P: EngineProcess]:
    """Made on a running loop; returns at once, `ready` waits for the models to be loaded.

    launch: starts the process of the engine with an index, and returns at once.
    capacity: KV tokens of each engine, once `ready`.
    weights: to be held from the first change of the trainer's weights until the engines serve the new ones;
        a restarted engine is given weights, and admitted, only while nobody else holds it.
    restore: gives one process the weights that the others serve; None where those are the model folder's.
    shares_device: whether the trainer uses the same memory; a successor is then started while the weights
        rest too, for it would take what the trainer needs.
    """

    def __init__(self, launch: Callable[[int], P], config: EngineConfig, shares_device: bool = False) -> None:
        self.shares_device = shares_device
        self.capacity: list[int] | None = None
        self.weights = asyncio.Lock()
        self.restore: Callable[[P], Awaitable[object]] | None = None
        self.restarts = 0
        self._config = config
        self._changed = asyncio.Event()
        self._supervisors: list[asyncio.Task[None]] = []
        self._fault: BaseException | None = None
        self.engines = [
            SupervisedEngine(self, partial(launch, index), config.health_seconds)
            for index in range(config.count)
        ]

    async def ready(self) -> None:
        """Raises EngineError where an engine has not started by `engine.start_seconds`."""
        self.capacity = await asyncio.gather(*(self.start(engine.process) for engine in self.engines))
        for engine in self.engines:
            engine.serve()
            supervisor = asyncio.create_task(engine.supervise())
            supervisor.add_done_callback(self._supervisor_done)
            self._supervisors.append(supervisor)

    def serving(self) -> list[SupervisedEngine[P]]:
        return [engine for engine in self.engines if engine.state is State.SERVING]

    async def call(self, method: str, *arguments: object) -> list[Any]:
        """The same call on every engine that serves, at the same time."""
        return await asyncio.gather(*(engine.call(method, *arguments) for engine in self.serving()))

    @asynccontextmanager
    async def resting(self) -> AsyncIterator[None]:
        """While the trainer computes: no restarted engine is given weights. Where devices are shared, the
        engines' memory is the trainer's meanwhile; their weights' part is to be restored before an update.
        """
        async with self.weights:
            if self.shares_device:
                await self._each("release_memory")
            yield
            await self.restore_memory("cache")

    async def restore_memory(self, part: Literal["weights", "cache"]) -> None:
        """Of every engine that serves; nothing is to be done where devices are not shared."""
        if self.shares_device:
            await self._each("restore_memory", part)

    async def _each(self, method: str, *arguments: object) -> None:
        """Call every engine that serves; one that fails is replaced."""
        engines = self.serving()
        calls = (engine.call(method, *arguments) for engine in engines)
        for engine, outcome in zip(
            engines, await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(outcome, EngineError):
                engine.fail(str(outcome))
            elif isinstance(outcome, BaseException):
                raise outcome

    async def close(self) -> None:
        """End the engines and the processes that they started."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(engine.process.end() for engine in self.engines))

    async def start(self, process: P) -> int:
        """Its KV tokens. Raises EngineError at the deadline."""
        seconds = self._config.start_seconds
        try:
            async with asyncio.timeout(seconds):
                return await process.start()
        except TimeoutError:
            raise EngineError(f"{process.name} has not started after {seconds:g} s") from None

    async def until_serving(self, engine: SupervisedEngine[P]) -> None:
        """Raises DeadEngineError as soon as another engine serves: what was asked can be asked there.

        Raises NoEngineError where every engine is given up.
        """
        seconds = self._config.start_seconds
        try:
            async with asyncio.timeout(seconds):
                while engine.state is not State.SERVING:
                    if self._fault is not None:
                        raise self._fault
                    if self.serving():
                        raise DeadEngineError(f"{engine.name} is {engine.state.value}: {engine.reason}")
                    if all(other.state is State.GIVEN_UP for other in self.engines):
                        raise NoEngineError(f"no engine is left: {self._reasons()}")
                    await self._changed.wait()
        except TimeoutError:
            raise EngineError(f"no engine serves after {seconds:g} s: {self._reasons()}") from None

    def take_restart(self) -> bool:
        """Whether one more restart is allowed in this run; counts it."""
        most = self._config.max_restarts
        if self.restarts == most:
            _log.error("engine.max_restarts = %d restarts are used up", most)
            return False
        self.restarts += 1
        return True

    def changed(self) -> None:
        """Some engine is in another state: whoever waits for one looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _reasons(self) -> str:
        return "; ".join(f"{engine.name} is {engine.state.value}: {engine.reason}" for engine in self.engines)

    def _supervisor_done(self, supervisor: asyncio.Task[None]) -> None:
        """A fault in the supervision itself, or in what restores the weights, ends whatever waits for it."""
        if not supervisor.cancelled() and (fault := supervisor.exception()) is not None:
            self._fault = fault
            self.changed()
