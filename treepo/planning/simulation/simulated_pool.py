"""The engines of a training run without processes: held and updated together, in virtual time."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.protocols import GenerateOutput, GenerateRequest, Sampler


class SimulatedPooledEngine:
    """Implements `treepo.protocols.Engine`. sampler: answers the requests."""

    status = "serving"

    def __init__(self, name: str, sampler: Sampler) -> None:
        self.name = name
        self.sampler = sampler

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        return await self.sampler.generate(request)


class SimulatedPool:
    """Implements `treepo.protocols.TrainingEnginePool`.

    sampler: what answers the requests of a simulated engine, for example one that ends answers where they
    should end. kv_tokens: of each engine. sync_seconds: of a weight sync, in which no engine serves.
    sampling_goes_on: whether the engines sample while the trainer computes.
    """

    def __init__(
        self,
        simulated: Sequence[SimulatedEngine],
        sampler: Callable[[SimulatedEngine], Sampler],
        kv_tokens: int,
        sync_seconds: float,
        *,
        sampling_goes_on: bool,
    ) -> None:
        self.simulated = simulated
        self.engines = [
            SimulatedPooledEngine(f"engine {index}", sampler(engine))
            for index, engine in enumerate(simulated)
        ]
        self.kv_tokens = [kv_tokens] * len(simulated)
        self._sync_seconds = sync_seconds
        self._sampling_goes_on = sampling_goes_on
        self._training = False

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """Hold the engines while the body runs, unless sampling goes on."""
        held = [] if self._sampling_goes_on else self.simulated
        await asyncio.gather(*(engine.hold() for engine in held))
        self._training = True
        yield
        self._training = False
        for engine in held:
            engine.release()

    def restarted_trainer(self) -> AbstractAsyncContextManager[None]:
        raise AssertionError("no simulated trainer is lost")

    async def sync_weights(self, version: int) -> None:
        """Make every engine serve `version`. Only inside `training`."""
        assert self._training
        await asyncio.gather(*(engine.begin(version) for engine in self.simulated))
        await asyncio.sleep(self._sync_seconds)
        for engine in self.simulated:
            engine.commit()
