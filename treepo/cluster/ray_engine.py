"""SGLang engines as Ray actors, each in a process of its own."""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from sglang_rollout.engine import SGLangEngine
from treepo.cluster.engine_pool import Fleet
from treepo.cluster.network import use_interface_of_node
from treepo.cluster.remote_sink import RemoteSink
from treepo.cluster.reservation import engines_alone
from treepo.config.engine import EngineConfig
from treepo.config.run import ModelConfig
from treepo.errors import DeadEngineError, TreepoError
from treepo.rollout.stopping import StopRule

_log = logging.getLogger(__name__)
_CONCURRENT_REQUESTS = 100_000  # the driver bounds what is in flight; Ray should not
_END_SECONDS = 30  # for an engine to end its processes; then its actor is killed, and they end with it


class HostedEngine(SGLangEngine):
    """An engine that says why it did not start when it is asked: of an actor whose constructor fails, Ray
    keeps a traceback and not the error.
    """

    def __init__(self, model: Path, dtype: str, config: EngineConfig, **settings: Any) -> None:
        self._failure: TreepoError | None = None
        use_interface_of_node()  # SGLang's processes inherit it
        try:
            super().__init__(model, dtype, config, **settings)
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
    """An engine behind a Ray actor; what goes wrong there is an EngineError here. ranks: tensor-parallel."""

    def __init__(self, name: str, actor: Any, ranks: int) -> None:
        self.name = name
        self.actor = actor
        self._ranks = ranks

    async def start(self) -> int:
        """Wait until the model is loaded; returns the tokens that the KV cache holds."""
        return await self.call("capacity")

    def sink(self) -> RemoteSink:
        """The same engine for the trainer's side of a weight update."""
        return RemoteSink(self.name, self.actor._actor_id.hex(), self._ranks, self.actor)

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
            raise DeadEngineError(f"{self.name} died: {' '.join(str(error).split())}") from error

    async def end(self) -> None:
        """End SGLang's processes, then the actor, which takes with it what is left of them."""
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self.call("close")
        except DeadEngineError:
            pass  # the actor is what has died
        except (TimeoutError, RayTaskError) as error:
            _log.warning("%s did not close and is killed: %r", self.name, error)
        finally:
            ray.kill(self.actor)


class EnginePool(Fleet[RemoteEngine]):
    """All engines of a run. Construction returns at once; `ready` waits for the models to be loaded.

    seats: Ray's options for each engine's actor; None where nothing trains beside the engines. shares_device:
    whether the trainer uses the same devices.
    """

    def __init__(
        self,
        config: ServingConfig,
        stop_rule: StopRule,
        seats: Sequence[dict[str, Any]] | None = None,
        shares_device: bool = False,
    ) -> None:
        seats = engines_alone(config.engine) if seats is None else seats
        launch = partial(_launch, config, stop_rule, seats, shares_device)
        super().__init__(launch, config.engine, shares_device)


def _launch(
    config: ServingConfig,
    stop_rule: StopRule,
    seats: Sequence[dict[str, Any]],
    shares_device: bool,
    index: int,
) -> RemoteEngine:
    remote = ray.remote(HostedEngine).options(max_concurrency=_CONCURRENT_REQUESTS, **seats[index])
    actor = remote.remote(
        config.model.path.resolve(),
        config.model.dtype,
        config.engine,
        seed=config.seed + index,
        stop_rule=stop_rule,
        shares_device=shares_device,
    )
    return RemoteEngine(f"engine {index}", actor, config.engine.tensor)
