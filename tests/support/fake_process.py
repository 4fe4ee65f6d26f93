"""A fake engine process that dies, hangs or fails to start when a test says so."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_engine import FakeEngine
from treepo.cluster.pooled_engine import Memory
from treepo.errors import DeadEngineError, EngineError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.weight_sync.wire import Manifest


@dataclass(eq=False)
class FakeProcess:
    """Implements `treepo.cluster.pooled_engine.EngineProcess`: answers as `engine` does.

    start_error: the error of its start. slow: it starts once `loaded` is set. dies_at, hangs_at: the number,
    from 1, of the request at which it dies, or from which on it answers nothing. healthy: whether it passes
    health checks though it answers no request. keeps_memory: it fails to offload. refuses_weights: it fails
    to commit. dies_when_held: it dies when it is held. memory: the parts that are on the device. moves: the
    calls of the pool, in order.
    """

    name: str
    engine: FakeEngine
    start_error: str | None = None
    slow: bool = False
    dies_at: int | None = None
    hangs_at: int | None = None
    healthy: bool = False
    keeps_memory: bool = False
    refuses_weights: bool = False
    dies_when_held: bool = False
    requests: int = 0
    health_checks: int = 0
    commits: int = 0
    ended: int = 0
    memory: set[str] = field(default_factory=lambda: {"weights", "cache"})
    moves: list[str] = field(default_factory=list)
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    _begun: int = 0
    _death: asyncio.Event = field(default_factory=asyncio.Event)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._released.set()
        if not self.slow:
            self.loaded.set()

    def die(self) -> None:
        self._death.set()

    async def start(self) -> int:
        await self.loaded.wait()
        if self.start_error is not None:
            raise EngineError(self.start_error)
        return 1000

    async def wait_for_death(self) -> str:
        await self._death.wait()
        return "its process ended"

    async def health_check(self) -> None:
        self._check_alive()
        self.health_checks += 1
        if not self.healthy:
            await asyncio.Event().wait()

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        self._check_alive()
        await self._released.wait()
        self.requests += 1
        number = len(self.engine.requests) + 1
        if self.dies_at is not None and number >= self.dies_at:
            self.die()
        if self.hangs_at is not None and number >= self.hangs_at:
            await asyncio.Event().wait()
        output = await self.engine.generate(request)
        self._check_alive()
        return output

    async def hold(self) -> None:
        self._move("hold")
        self._released.clear()
        if self.dies_when_held:
            self.die()
        self._check_alive()

    async def release(self) -> None:
        self._move("release")
        assert self.memory == {"weights", "cache"}
        self._released.set()

    async def begin(self, version: int, manifest: Manifest) -> None:
        del manifest
        self._move("begin")
        self._begun = version

    def sink(self) -> Any:
        """The test's trainer sends to the process itself."""
        return self

    async def commit(self) -> None:
        self._move("commit")
        self.commits += 1
        if self.refuses_weights:
            raise EngineError(f"{self.name} refuses the weights")
        self.engine.version = self._begun

    async def abort(self, reason: str) -> None:
        del reason
        self._check_alive()

    async def offload(self) -> None:
        self._move("offload")
        assert not self._released.is_set()
        if self.keeps_memory:
            raise EngineError("it does not release its memory")
        self.memory = set()

    async def reload(self, memory: Memory) -> None:
        self._move(f"reload {memory}")
        self.memory.add(memory)

    async def end(self) -> None:
        self.ended += 1
        self.die()

    def _move(self, name: str) -> None:
        self._check_alive()
        self.moves.append(name)

    def _check_alive(self) -> None:
        if self._death.is_set():
            raise DeadEngineError(f"{self.name} is dead")
