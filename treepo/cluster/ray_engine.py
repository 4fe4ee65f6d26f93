"""SGLang engines as Ray actors, each in a process of its own."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from sglang_rollout.engine import SGLangEngine
from sglang_rollout.rank_store import Meeting, open_store
from treepo.cluster.actor_death import note_start, own_last_lines
from treepo.cluster.engine_devices import EngineDevices
from treepo.cluster.engine_share import HostedShare, Share
from treepo.cluster.pooled_engine import Memory
from treepo.cluster.ray_actor import UNRECORDED, own_error, use_interface_of_node
from treepo.cluster.request_channel import Answers, Posted, RequestChannel, RequestDesk
from treepo.config.engine import EngineConfig
from treepo.config.run import ModelConfig
from treepo.config.trainer import LoraConfig
from treepo.errors import DeadEngineError, TreepoError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout import rng
from treepo.rollout.stopping import StopRule
from treepo.weight_sync.wire import Address, Bucket, Manifest

_CONCURRENT_REQUESTS = 100_000  # the driver bounds the requests in flight; Ray should not


class HostedEngine(SGLangEngine):
    """The engine in its actor, or the first share of one on several nodes, which answers for all.

    others: actors of `HostedShare`, one for each further share; they are told where to meet. If SGLang does
    not start, `capacity` raises the error: of a constructor that fails, Ray keeps only the traceback.
    """

    def __init__(
        self, model: Path, dtype: str, config: EngineConfig, others: Sequence[Any] = (), **settings: Any
    ) -> None:
        self._failure: TreepoError | None = None
        note_start()
        self._desk = RequestDesk(self.generate)
        use_interface_of_node()  # SGLang's processes inherit it
        try:
            if others:
                host = ray.util.get_node_ip_address()
                store = open_store(host)
                for share, actor in enumerate(others, start=1):
                    actor.start.remote(Meeting(host, store.port, share))
                settings |= {"meeting": Meeting(host, store.port, share=0), "store": store}
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
        first, *further = self.devices.options[index]
        engine = self.config.engine.model_copy(update={"nodes": 1 + len(further)})
        model, name = self.config.model, f"engine {index}"
        settings = {
            "model": model.path.resolve(),
            "dtype": model.dtype,
            "config": engine,
            "seed": engine_seed(self.config.seed, index),
            "shares_device": self.shares_devices,
            "paths_at_once": self.paths_at_once,
            "routes": self.routes,
            "lora": self.lora,
        }
        remote_share: Any = ray.remote(HostedShare)
        others = [remote_share.options(**UNRECORDED | options).remote(**settings) for options in further]
        remote: Any = ray.remote(HostedEngine)
        actor = remote.options(max_concurrency=_CONCURRENT_REQUESTS, **UNRECORDED | first).remote(
            others=others, stop_rule=self.stop_rule, **settings
        )
        shares = [Share(f"{name}, share {share}", other) for share, other in enumerate(others, start=1)]
        return RayEngine(name, actor, engine.ranks, shares)

    async def find_devices(self, index: int) -> None:
        await self.devices.find(index)

    async def devices_lost(self, index: int) -> None:
        await self.devices.lost(index)


class RayEngine(Share):
    """Implements `treepo.cluster.pooled_engine.EngineProcess` with an actor of `HostedEngine`, and one of
    `HostedShare` for each further share.

    ranks: of all shares. A TreepoError raised in an actor arrives with the engine's or the share's name.
    """

    def __init__(self, name: str, actor: Any, ranks: int, further: Sequence[Share] = ()) -> None:
        super().__init__(name, actor)
        self._ranks, self._further = ranks, further
        self._channel = RequestChannel(actor)

    async def start(self) -> int:
        """Wait for the models of all shares. Raises the first failure of one."""
        loading = [asyncio.ensure_future(share.ready()) for share in self._further]
        try:
            tokens, *_ = await asyncio.gather(self._answer(self.actor.capacity), *loading)
        finally:
            for share in loading:
                share.cancel()
        self._started = True
        return tokens

    async def end(self) -> None:
        await asyncio.gather(super().end(), *(share.end() for share in self._further))

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        try:
            return await self._channel.generate(request)
        except (RayTaskError, RayActorError) as error:
            raise await self._own(error) from None

    async def health_check(self) -> None:
        await self._answer(self.actor.health_check)

    async def wait_for_death(self) -> str:
        """Return the reason once any share has died: the others cannot answer without it."""
        waits = (super().wait_for_death(), *map(_named_death, enumerate(self._further, start=1)))
        deaths = [asyncio.ensure_future(wait) for wait in waits]
        try:
            done, _ = await asyncio.wait(deaths, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for death in deaths:
                death.cancel()

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


async def _named_death(numbered: tuple[int, Share]) -> str:
    number, share = numbered
    return f"share {number}: {await share.wait_for_death()}"


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
