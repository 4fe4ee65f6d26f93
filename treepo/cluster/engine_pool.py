"""The engines of a command: the pool starts, watches, restarts and updates them.

If an engine is lost, the pool ends its process, starts another while everything else goes on, and gives it
the current weights before it serves. `engine.max_restarts` bounds the restarts of a run.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Protocol

from treepo.cluster.pooled_engine import EngineProcess, PooledEngine, State
from treepo.config.engine import EngineConfig
from treepo.errors import (
    DeadEngineError,
    EngineError,
    ModelError,
    NoEngineError,
    TransportError,
    WeightsRefusedError,
)
from treepo.watchdog import waiting
from treepo.weight_sync.transaction import GRACE_SECONDS, UpdateFailedError, WeightSender, update_weights

_log = logging.getLogger(__name__)


class EnginePool[P: EngineProcess]:
    """Implements `treepo.protocols.EnginePool` with engines that serve the model folder's weights.

    Construct it on a running loop: construction starts the processes, `ready` waits for their models.
    launch: starts the process of the engine with the given index, and returns at once.
    """

    def __init__(self, launch: Callable[[int], P], config: EngineConfig) -> None:
        self.restarts = 0
        self.kv_tokens: list[int] = []
        self._config = config
        self._changed = asyncio.Event()
        self._supervisors: list[asyncio.Task[None]] = []
        self._fault: BaseException | None = None
        self.engines = [
            PooledEngine(partial(launch, index), self, config.health_seconds) for index in range(config.count)
        ]

    async def ready(self) -> None:
        """Wait until all engines serve. Raises EngineError if one does not by `engine.start_seconds`."""
        self.kv_tokens = await asyncio.gather(*(self._start(engine.process) for engine in self.engines))
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
        """Return when `engine` serves. The deadline begins again while no restarted engine may serve.

        Raises DeadEngineError as soon as another engine serves, where the request can be repeated, and
        NoEngineError if every engine is given up.
        """
        seconds = self._config.start_seconds
        while True:
            try:
                async with asyncio.timeout(seconds):
                    return await self._serves(engine)
            except TimeoutError:
                if not self._restarts_wait():
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

    async def _start(self, process: P) -> int:
        """Wait for the model; returns the KV tokens. Raises EngineError at the deadline."""
        seconds = self._config.start_seconds
        try:
            with waiting("the engine pool", f"{process.name} to start"):
                async with asyncio.timeout(seconds):
                    return await process.start()
        except TimeoutError:
            raise EngineError(f"{process.name} has not started after {seconds:g} s") from None

    async def _supervise(self, engine: PooledEngine[P]) -> None:
        """Restart the engine whenever it is lost; return when it is given up."""
        while True:
            await engine.watch()
            await engine.process.end()
            if self.restarts == self._config.max_restarts:
                _log.error("engine.max_restarts = %d: all restarts are used up", self.restarts)
                engine.give_up()
                _log.error("%s is given up: %s", engine.name, engine.reason)
                return
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
        await self._start(engine.process)
        engine.serve()

    def _statuses(self) -> str:
        return "; ".join(f"{engine.name} is {engine.status}" for engine in self.engines)

    def _supervisor_done(self, supervisor: asyncio.Task[None]) -> None:
        """Pass an error of the supervisor, or of the trainer during a restart, to the requests that wait."""
        if not supervisor.cancelled() and (fault := supervisor.exception()) is not None:
            self._fault = fault
            self.state_changed()


class ColocatedTrainer(WeightSender, Protocol):
    """The trainer as the pool uses it; `treepo.cluster.trainer_group.TrainerGroup` implements it."""

    async def offload(self, weights: bool) -> None:
        """Give the devices to the engines. weights: whether that may include the trainer's weights."""
        ...

    async def reload(self) -> None:
        """Take the devices back, before anything is computed."""
        ...


class TrainingEnginePool[P: EngineProcess](EnginePool[P]):
    """Implements `treepo.protocols.TrainingEnginePool`.

    shares_devices: whether the trainer uses the engines' devices. Engines and trainer then use the memory in
    turn, and an engine is restarted only during the engines' turn. sampling_goes_on: whether engines sample
    while the trainer computes; else they are held. Not together with `shares_devices`.
    """

    def __init__(
        self,
        launch: Callable[[int], P],
        config: EngineConfig,
        trainer: ColocatedTrainer,
        shares_devices: bool,
        sampling_goes_on: bool,
    ) -> None:
        assert not (shares_devices and sampling_goes_on)
        super().__init__(launch, config)
        self._trainer = trainer
        self._shares_devices = shares_devices
        self._sampling_goes_on = sampling_goes_on
        self._pauses = 0  # holds and weight syncs in progress
        # Held from the first change of the trainer's weights until the engines serve the new ones, and while
        # a restarted engine takes weights.
        self._weights = asyncio.Lock()
        self._version = 0  # the model folder's
        self._weights_offloaded = False
        self._refusals: dict[PooledEngine[P], str] = {}  # by engines whose last update was refused

    def suspends_health_checks(self) -> bool:
        return self._pauses > 0

    def _restarts_wait(self) -> bool:
        return self._weights.locked()  # the trainer's weights are of no version that is served

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """Let the trainer compute and change its weights while the body runs.

        Unless sampling goes on, the engines are held meanwhile.
        """
        if self._fault is not None:
            raise self._fault
        async with self._weights:
            if self._sampling_goes_on:
                yield
                return
            with self._paused():
                await self._each(lambda engine: engine.hold())
                if self._shares_devices:
                    await self._each(lambda engine: engine.offload())
                    self._weights_offloaded = True
                    await self._trainer.reload()
                yield
                await self._reload_weights()
                if self._shares_devices:
                    await self._trainer.offload(weights=True)
                    await self._each(lambda engine: engine.reload("cache"))
                await self._each(lambda engine: engine.release())

    async def sync_weights(self, version: int) -> None:
        """Make every serving engine serve the trainer's weights as `version`; replace those that fail.

        If no engine serves or takes the weights, the restarted engines take them. Raises what the trainer
        raises, and WeightsRefusedError if an engine has refused its last two updates for the same reason.
        """
        assert self._weights.locked()
        await self._reload_weights()
        with self._paused():
            failed = await self._failed_updates(version)
        for engine in self.serving():
            engine_error = failed.get(engine)
            self._note_update(engine, engine_error)
            if engine_error is not None:
                engine.fail(str(engine_error))
        self._version = version

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Suspend health checks while the body runs."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            for engine in self.engines:
                engine.restart_clock()

    async def _failed_updates(self, version: int) -> Mapping[PooledEngine[P], EngineError]:
        engines = self.serving()
        if not engines:
            return {}
        try:
            return await update_weights(self._trainer, engines, version, self._config.update_seconds)
        except UpdateFailedError as error:
            return error.failed

    def _note_update(self, engine: PooledEngine[P], error: EngineError | None) -> None:
        """Raise WeightsRefusedError at the second refusal in a row with the same reason: a restart in between
        has not helped, so none will. A death and a broken transport are no refusals.
        """
        if error is None or isinstance(error, (DeadEngineError, TransportError)):
            self._refusals.pop(engine, None)
            return
        if self._refusals.get(engine) == str(error):
            reason = str(error).removeprefix(f"{engine.name}: ")
            raise WeightsRefusedError(f"{engine.name} refuses the weights, also after a restart: {reason}")
        self._refusals[engine] = str(error)

    async def _restart(self, engine: PooledEngine[P]) -> None:
        async with AsyncExitStack() as stack:
            if self._shares_devices:  # else a model loads while the trainer works
                await stack.enter_async_context(self._weights)
            engine.replace_process()
            await self._start(engine.process)
            if not self._shares_devices:
                await stack.enter_async_context(self._weights)
            if self._version > 0:
                seconds = self._config.update_seconds
                try:
                    await update_weights(self._trainer, [engine.process], self._version, seconds)
                except UpdateFailedError as error:
                    self._note_update(engine, *error.failed.values())
                    raise
                self._note_update(engine, None)
                if self._shares_devices:
                    await self._trainer.release_cache()
            engine.serve()

    async def _reload_weights(self) -> None:
        """Take back the memory of the engines' weights, if the trainer has it."""
        if self._weights_offloaded:
            await self._trainer.offload(weights=False)  # a sync reads them
            await self._each(lambda engine: engine.reload("weights"))
            self._weights_offloaded = False

    async def _each(self, call: Callable[[PooledEngine[P]], Coroutine[Any, Any, None]]) -> None:
        """Call every serving engine; replace those that fail."""

        async def bounded(engine: PooledEngine[P]) -> None:
            seconds = 2 * self._config.update_seconds + GRACE_SECONDS  # offloading takes two steps
            try:
                async with asyncio.timeout(seconds):
                    await call(engine)
            except TimeoutError:
                engine.fail(f"no answer within {seconds:g} s")
            except EngineError as error:
                engine.fail(str(error))

        await asyncio.gather(*map(bounded, self.serving()))
