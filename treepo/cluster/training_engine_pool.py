"""The engines of a training run, which take the trainer's weights and may share its devices."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Protocol

from treepo.cluster.engine_pool import EnginePool, Launcher
from treepo.cluster.pooled_engine import EngineProcess, PooledEngine
from treepo.config.engine import EngineConfig
from treepo.errors import (
    DeadEngineError,
    EngineError,
    LostTrainerError,
    TransportError,
    WeightsRefusedError,
)
from treepo.weight_sync.transaction import GRACE_SECONDS, UpdateFailedError, WeightSender, update_weights


class ColocatedTrainer(WeightSender, Protocol):
    """The trainer as the pool uses it; `treepo.cluster.trainer_group.TrainerGroup` implements it."""

    async def restart(self) -> None:
        """Start a lost trainer again, with the model folder's weights."""
        ...

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
        launch: Launcher[P],
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
        self._trainer_restarts = 0
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
        async with self._weights, self._turn():
            if self._shares_devices:
                await self._trainer.reload()
            yield

    @asynccontextmanager
    async def restarted_trainer(self) -> AsyncIterator[None]:
        """As `training`, with a trainer that was lost and is started again.

        The engines stay as the failure left them until then: held, offloaded, or in half an update. The body
        loads the trainer's weights and syncs them.
        """
        if self._fault is not None and not isinstance(self._fault, LostTrainerError):
            raise self._fault
        async with self._weights:
            await self._each(lambda engine: engine.reload_all())  # the lost trainer's memory is free
            self._weights_offloaded = False
            async with self._turn():
                await self._trainer.restart()
                yield
        self._fault = None
        self._trainer_restarts += 1
        self.state_changed()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The trainer's turn: engines that share its devices offload, and unless sampling goes on, all are
        held.
        """
        if self._sampling_goes_on:
            yield
            return
        with self._paused():
            await self._each(lambda engine: engine.hold())
            if self._shares_devices:
                await self._each(lambda engine: engine.offload())
                self._weights_offloaded = True
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
        """Restart the engine. If the trainer is lost meanwhile, wait until it is back, and begin again."""
        while True:
            trainer_restarts = self._trainer_restarts
            try:
                return await self._restart_with_weights(engine)
            except LostTrainerError as error:
                if trainer_restarts == self._trainer_restarts:
                    self._fault = error  # reaches the loop, which has the trainer started again
                    self.state_changed()
                await engine.process.end()
            while trainer_restarts == self._trainer_restarts:
                await self._changed.wait()

    async def _restart_with_weights(self, engine: PooledEngine[P]) -> None:
        async with AsyncExitStack() as stack:
            if self._shares_devices:  # else a model loads while the trainer works
                await stack.enter_async_context(self._weights)
            engine.replace_process()
            await self._start(engine)
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
        """Call every serving engine, and replace each one that fails."""

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
