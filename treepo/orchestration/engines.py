"""SGLang engines as Ray actors, each in a process of its own."""

import asyncio
import logging
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.config.schema import ModelConfig
from treepo.errors import EngineError, TreepoError
from treepo.orchestration.cluster import actor_environment, has_gpus
from treepo.orchestration.remote_sink import RemoteSink
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.stopping import StopRule

_log = logging.getLogger(__name__)
_CONCURRENT_REQUESTS = 100_000  # the driver bounds what is in flight; Ray should not


class HostedEngine(SGLangEngine):
    """An engine that says why it did not start when it is asked: of an actor whose constructor fails, Ray
    keeps a traceback and not the error.
    """

    def __init__(
        self, model: Path, dtype: str, config: EngineConfig, *, seed: int, stop_rule: StopRule | None = None
    ) -> None:
        self._failure: TreepoError | None = None
        try:
            super().__init__(model, dtype, config, seed=seed, stop_rule=stop_rule)
        except TreepoError as error:
            self._failure = error

    def capacity(self) -> int:
        """Tokens in the KV cache. Raises what ended the start."""
        if self._failure is not None:
            raise self._failure
        return super().capacity()

    def close(self) -> None:
        if self._failure is None:
            super().close()


class ServingConfig(Protocol):
    """The parts of a command's configuration that engines need."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def seed(self) -> int: ...


class RemoteEngine:
    """A `treepo.protocols.Engine` behind a Ray actor; what goes wrong there is an EngineError here."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.actor = actor

    def sink(self) -> RemoteSink:
        """The same engine for the trainer's side of a weight update."""
        return RemoteSink(self.name, self.actor._actor_id.hex(), 1, self.actor)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        return await self.call("generate", request)

    async def call(self, method: str, *arguments: object) -> Any:
        """The result of the actor's `method`; cancelled there when it is cancelled here."""
        reference = getattr(self.actor, method).remote(*arguments)
        try:
            return await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayTaskError as error:
            if isinstance(error.cause, TreepoError):
                raise type(error.cause)(f"{self.name}: {error.cause}") from None
            raise
        except RayActorError as error:
            raise EngineError(f"{self.name} died: {' '.join(str(error).split())}") from error


class EnginePool:
    """All engines of a run. Construction returns at once; `ready` waits for the models to be loaded."""

    def __init__(self, config: ServingConfig, stop_rule: StopRule) -> None:
        resources = {"num_cpus": 1, "num_gpus": 1 if has_gpus() else 0}
        remote = ray.remote(HostedEngine).options(
            max_concurrency=_CONCURRENT_REQUESTS, runtime_env=actor_environment(), **resources
        )
        self.capacity: list[int] | None = None  # KV tokens of each engine, once `ready`
        self._deadline = config.engine.start_seconds
        self.engines = [
            RemoteEngine(
                f"engine {index}",
                remote.remote(
                    config.model.path.resolve(),
                    config.model.dtype,
                    config.engine,
                    seed=config.seed + index,
                    stop_rule=stop_rule,
                ),
            )
            for index in range(config.engine.count)
        ]

    async def ready(self) -> None:
        """Raises EngineError or ModelError, naming the engine, where one does not start, and EngineError
        where one has not started by `engine.start_seconds`.
        """
        try:
            async with asyncio.timeout(self._deadline):
                self.capacity = await self.call("capacity")
        except TimeoutError:
            raise EngineError(
                f"not all engines have started within engine.start_seconds = {self._deadline:g}"
            ) from None

    async def call(self, method: str, *arguments: object) -> list[Any]:
        """The same call on every engine at the same time."""
        return await asyncio.gather(*(engine.call(method, *arguments) for engine in self.engines))

    async def close(self) -> None:
        """End the engines and the processes that they started; one that is dead already has none left."""
        calls = (engine.call("close") for engine in self.engines)
        for engine, outcome in zip(
            self.engines, await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(outcome, BaseException):
                _log.warning("%s did not close: %s", engine.name, outcome)
