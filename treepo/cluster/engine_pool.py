"""The engines of a command: the pool starts, watches, restarts and updates them.

If an engine is lost, the pool ends its process, starts another while everything else goes on, and gives it
the current weights before it serves. `engine.max_restarts` bounds the restarts of a run.
"""

import asyncio
import logging
from functools import partial
from typing import Protocol

from treepo.cluster.pooled_engine import EngineProcess, PooledEngine, State
from treepo.config.engine import EngineConfig
from treepo.errors import (
    DeadEngineError,
    EngineError,
    ModelError,
    NoEngineError,
    PlacementError,
)

_log = logging.getLogger(__name__)


class Launcher[P](Protocol):
    """Starts the processes of engines."""

    def __call__(self, index: int) -> P:
        """Start a process of the engine with the index, and return at once."""
        ...

    async def find_devices(self, index: int) -> None:
        """Return once there are devices for another process of the engine: at once unless its node is lost.
        Raises PlacementError if there are none by a deadline.
        """
        ...

    async def devices_lost(self, index: int) -> None:
        """Return once the node of the engine's devices is lost."""
        ...


class EnginePool[P: EngineProcess]:
    """Implements `treepo.protocols.EnginePool` with engines that serve the model folder's weights.

    Construct it on a running loop: construction starts the processes, `ready` waits for their models.
    """

    def __init__(self, launch: Launcher[P], config: EngineConfig) -> None:
        self.restarts = 0
        self.kv_tokens: list[int] = []
        self._launch, self._config = launch, config
        self._seekers = 0  # engines that wait for devices
        self._changed = asyncio.Event()
        self._supervisors: list[asyncio.Task[None]] = []
        self._fault: BaseException | None = None
        self.engines = [
            PooledEngine(partial(launch, index), self, config.health_seconds) for index in range(config.count)
        ]

    async def ready(self) -> None:
        """Wait until all engines serve. Raises EngineError if one does not by `engine.start_seconds`."""
        self.kv_tokens = await asyncio.gather(*map(self._start, self.engines))
        for engine in self.engines:
            engine.serve()
            supervisor = asyncio.create_task(self._supervise(engine))
            supervisor.add_done_callback(self._supervisor_done)
            self._supervisors.append(supervisor)

    async def close(self) -> None:
        """End the engines and every process that they started."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(engine.process.end() for engine in self.engines))

    def serving(self) -> list[PooledEngine[P]]:
        return [engine for engine in self.engines if engine.state is State.SERVING]

    def state_changed(self) -> None:
        """Wake the requests that wait for an engine."""
        self._changed.set()
        self._changed = asyncio.Event()

    def suspends_health_checks(self) -> bool:
        return False

    async def wait_to_serve(self, engine: PooledEngine[P]) -> None:
        """Return when `engine` serves. The deadline begins again while a lost engine waits for devices, and
        while no restarted engine may serve.

        Raises DeadEngineError as soon as another engine serves, where the request can be repeated, and
        NoEngineError if every engine is given up.
        """
        seconds = self._config.start_seconds
        while True:
            try:
                async with asyncio.timeout(seconds):
                    return await self._serves(engine)
            except TimeoutError:
                if not self._seekers and not self._restarts_wait():
                    raise EngineError(f"no engine serves after {seconds:g} s: {self._statuses()}") from None

    async def _serves(self, engine: PooledEngine[P]) -> None:
        while engine.state is not State.SERVING:
            if self._fault is not None:
                raise self._fault
            if self.serving():
                raise DeadEngineError(f"{engine.name} is {engine.status}")
            if all(other.state is State.GIVEN_UP for other in self.engines):
                raise NoEngineError(f"no engine is left: {self._statuses()}")
            await self._changed.wait()

    def _restarts_wait(self) -> bool:
        """Whether a restarted engine has to wait before it may serve."""
        return False

    async def _start(self, engine: PooledEngine[P]) -> int:
        """Wait for the model; returns the KV tokens. Raises EngineError at the deadline, or if the node is
        lost.
        """
        process, seconds = engine.process, self._config.start_seconds
        starting = asyncio.ensure_future(process.start())
        lost = asyncio.ensure_future(self._launch.devices_lost(self.engines.index(engine)))
        try:
            await asyncio.wait((starting, lost), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                return starting.result()
            if lost.done():
                lost.result()
                raise DeadEngineError(f"{process.name}: its node left the cluster while it started")
            raise EngineError(f"{process.name} has not started after {seconds:g} s")
        finally:
            starting.cancel()
            lost.cancel()
            await asyncio.gather(starting, lost, return_exceptions=True)

    async def _supervise(self, engine: PooledEngine[P]) -> None:
        """Restart the engine whenever it is lost; return when it is given up."""
        while True:
            await engine.watch()
            await engine.process.end()
            if self.restarts == self._config.max_restarts:
                _log.error("engine.max_restarts = %d: all restarts are used up", self.restarts)
            elif await self._finds_devices(engine):
                await self._restart_once(engine)
                continue
            engine.give_up()
            _log.error("%s is given up: %s", engine.name, engine.reason)
            return

    async def _finds_devices(self, engine: PooledEngine[P]) -> bool:
        """Wait until the engine can be started. Meanwhile the others go on, and no restart is used up."""
        self._seekers += 1
        try:
            await self._launch.find_devices(self.engines.index(engine))
        except PlacementError as error:
            engine.reason = f"{engine.reason}; {error}"
            return False
        finally:
            self._seekers -= 1
        return True

    async def _restart_once(self, engine: PooledEngine[P]) -> None:
        self.restarts += 1
        _log.warning("%s is restarted: %s", engine.name, engine.reason)
        try:
            await self._restart(engine)
        except (EngineError, ModelError) as error:
            engine.lose(str(error))
        else:
            _log.warning("%s serves again", engine.name)

    async def _restart(self, engine: PooledEngine[P]) -> None:
        engine.replace_process()
        await self._start(engine)
        engine.serve()

    def _statuses(self) -> str:
        return "; ".join(f"{engine.name} is {engine.status}" for engine in self.engines)

    def _supervisor_done(self, supervisor: asyncio.Task[None]) -> None:
        """Pass an error of the supervisor, or of the trainer during a restart, to the requests that wait."""
        if not supervisor.cancelled() and (fault := supervisor.exception()) is not None:
            self._fault = fault
            self.state_changed()
