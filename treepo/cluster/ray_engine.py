"""SGLang engines as Ray actors, each in a process of its own."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from sglang_rollout.engine import SGLangEngine
from treepo.cluster.actor_death import death_of, note_start, own_last_lines
from treepo.cluster.engine_devices import EngineDevices
from treepo.cluster.pooled_engine import Memory
from treepo.cluster.ray_actor import UNRECORDED, own_error, use_interface_of_node
from treepo.cluster.ray_watch import unless_lost
from treepo.cluster.request_channel import Answers, Posted, RequestChannel, RequestDesk
from treepo.config.engine import EngineConfig
from treepo.config.run import ModelConfig
from treepo.config.trainer import LoraConfig
from treepo.errors import ClusterError, DeadEngineError, TreepoError, one_line
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout import rng
from treepo.rollout.stopping import StopRule
from treepo.weight_sync.wire import Address, Bucket, Manifest

_log = logging.getLogger(__name__)
_CONCURRENT_REQUESTS = 100_000  # the driver bounds the requests in flight; Ray should not
_LAST_LINES_SECONDS = 10
_END_SECONDS = 30  # for an engine to end its processes; then its actor is killed, and they end with it


class HostedEngine(SGLangEngine):
    """The engine in its actor.

    If SGLang does not start, `capacity` raises the error: of a constructor that fails, Ray keeps only the
    traceback.
    """

    def __init__(self, model: Path, dtype: str, config: EngineConfig, **settings: Any) -> None:
        self._failure: TreepoError | None = None
        note_start()
        self._desk = RequestDesk(self.generate)
        use_interface_of_node()  # SGLang's processes inherit it
        try:
            super().__init__(model, dtype, config, **settings)
        except TreepoError as error:
            self._failure = error

    def capacity(self) -> int:
        """Tokens in the KV cache. Raises the error that ended the start."""
        if self._failure is not None:
            raise self._failure
        return super().capacity()

    def last_lines(self) -> str:
        """How SGLang's processes ended, and what they wrote last."""
        return own_last_lines([child.pid for child in self._sglang._children])

    async def post(self, requests: Posted, cancelled: Sequence[int]) -> None:
        self._desk.post(requests, cancelled)

    async def collect(self) -> Answers:
        return await self._desk.collect()

    def close(self) -> None:
        if self._failure is None:
            super().close()


class ServingConfig(Protocol):
    """The parts of a command's configuration that its engines need."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def seed(self) -> int: ...


def engine_seed(seed: int, index: int) -> int:
    """The seed of an engine's own random numbers, of which SGLang and numpy take 31 bits.

    Requests have seeds of their own (treepo.rollout.rng), so no sampled token depends on it.
    """
    plain = seed + index
    return plain if plain < 1 << 31 else rng.seed(seed, "engine", index)


@dataclass(frozen=True, slots=True)
class EngineLauncher:
    """Implements `treepo.cluster.engine_pool.Launcher` with actors.

    shares_devices: whether the trainer uses the same devices. paths_at_once: the most paths that one engine
    samples at once; None if unknown. routes: whether requests may ask for routes. lora: of the adapter that
    weight syncs bring; None if they bring weights.
    """

    config: ServingConfig
    stop_rule: StopRule
    devices: EngineDevices
    shares_devices: bool
    paths_at_once: int | None = None
    routes: bool = False
    lora: LoraConfig | None = None

    def __call__(self, index: int) -> "RayEngine":
        config = self.config
        remote: Any = ray.remote(HostedEngine)
        options = UNRECORDED | self.devices.options[index]
        actor = remote.options(max_concurrency=_CONCURRENT_REQUESTS, **options).remote(
            config.model.path.resolve(),
            config.model.dtype,
            config.engine,
            seed=engine_seed(config.seed, index),
            stop_rule=self.stop_rule,
            shares_device=self.shares_devices,
            paths_at_once=self.paths_at_once,
            routes=self.routes,
            lora=self.lora,
        )
        return RayEngine(f"engine {index}", actor, config.engine.tensor)

    async def find_devices(self, index: int) -> None:
        await self.devices.find(index)

    async def devices_lost(self, index: int) -> None:
        await self.devices.lost(index)


class RayEngine:
    """Implements `treepo.cluster.pooled_engine.EngineProcess` with an actor of `HostedEngine`.

    ranks: tensor-parallel ranks. A TreepoError raised in the actor arrives with the engine's name.
    """

    def __init__(self, name: str, actor: Any, ranks: int) -> None:
        self.name = name
        self.actor = actor
        self._ranks = ranks
        self._said: asyncio.Future[str] | None = None  # the cause of death, asked for once
        self._channel = RequestChannel(actor)
        self._started = False

    async def start(self) -> int:
        tokens = await self._answer(self.actor.capacity)
        self._started = True
        return tokens

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        try:
            return await self._channel.generate(request)
        except (RayTaskError, RayActorError) as error:
            raise await self._own(error) from None

    async def health_check(self) -> None:
        await self._answer(self.actor.health_check)

    async def wait_for_death(self) -> str:
        return f"{await self._answer(self.actor.died)}; {await self._once(self._last_lines())}"

    async def hold(self) -> None:
        await self._answer(self.actor.hold)

    async def release(self) -> None:
        await self._answer(self.actor.release)

    async def begin(self, version: int, manifest: Manifest) -> None:
        await self._answer(self.actor.begin, version, manifest)

    async def commit(self) -> None:
        await self._answer(self.actor.commit)

    async def abort(self, reason: str) -> None:
        await self._answer(self.actor.abort, reason)

    async def offload(self) -> None:
        await self._answer(self.actor.offload)

    async def reload(self, memory: Memory) -> None:
        await self._answer(self.actor.reload, memory)

    def sink(self) -> "RaySink":
        return RaySink(self.name, self.actor._actor_id.hex(), self._ranks, self.actor)

    async def end(self) -> None:
        """End SGLang's processes, then the actor; processes that are left end with it."""
        try:
            if self._started:  # an actor that starts SGLang answers no call
                async with asyncio.timeout(_END_SECONDS):
                    await self._answer(self.actor.close)
        except (DeadEngineError, ClusterError):
            pass  # the actor itself has died, or Ray, whose watch ends what is left
        except (TimeoutError, TreepoError) as error:
            reason = one_line(error) or f"no answer within {_END_SECONDS} s"
            _log.warning("%s did not close and is killed: %s", self.name, reason)
        finally:
            ray.kill(self.actor)

    async def _answer(self, method: Any, *arguments: object) -> Any:
        """Call a method of the actor. Cancelling this call cancels the method in the actor too."""
        reference = method.remote(*arguments)
        try:
            return await unless_lost(reference)
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except (RayTaskError, RayActorError) as error:
            raise await self._own(error) from None

    async def _own(self, error: RayTaskError | RayActorError) -> BaseException:
        """Our own error in place of Ray's, with the engine's name. A fault is an ActorError, whose traceback
        is in the log.
        """
        if isinstance(error, RayActorError):
            return DeadEngineError(f"{self.name}: {await self._once(death_of(error))}")
        own = own_error(error, DeadEngineError)
        if isinstance(own, DeadEngineError):
            return DeadEngineError(f"{self.name}: {own}; {await self._once(self._last_lines())}")
        return type(own)(f"{self.name}: {own}") if isinstance(own, TreepoError) else own

    async def _once(self, ask: Coroutine[Any, Any, str]) -> str:
        """The answer to the first question after the death, for all calls that fail with it."""
        if self._said is None:
            self._said = asyncio.ensure_future(ask)
        else:
            ask.close()
        return await asyncio.shield(self._said)

    async def _last_lines(self) -> str:
        """What SGLang's processes said last; the actor outlives them."""
        try:
            async with asyncio.timeout(_LAST_LINES_SECONDS):
                return await self.actor.last_lines.remote()
        except (RayTaskError, RayActorError, TimeoutError) as error:
            return f"its last lines cannot be read: {type(error).__name__}"


@dataclass(frozen=True, slots=True)
class RaySink:
    """Implements `treepo.weight_sync.send.WeightSink` for the same actor; pickled to trainer rank 0."""

    name: str
    key: str
    ranks: int
    actor: Any

    def join(self, addresses: Sequence[Address]) -> "Future[None]":
        return _with_own_errors(self.actor.join.remote(addresses).future())

    def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
        return _with_own_errors(self.actor.load.remote(buckets).future())


def _with_own_errors(call: "Future[None]") -> "Future[None]":
    """Return a future with the same result, and our errors in place of Ray's."""
    result: Future[None] = Future()

    def done(call: "Future[None]") -> None:
        error = call.exception()
        if error is None:
            result.set_result(None)
        else:
            result.set_exception(own_error(error, DeadEngineError))

    call.add_done_callback(done)
    return result
