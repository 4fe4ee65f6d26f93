"""An engine's process that dies, hangs and starts as a test wants it to."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_engine import FakeEngine
from treepo.errors import DeadEngineError, EngineError


@dataclass(eq=False)
class FakeProcess:
    """Serves as `engine` does, until it is told to die or to hang.

    start_error: what its start fails with. slow: it has started once `loaded` is set. dies_at: the request
    (from 1) that ends it. hangs_at: from which on it answers nothing. lively: whether it shows life though
    it answers no request. clings: whether it keeps its memory. refuses: whether it takes no weights. memory:
    what it has.
    """

    name: str
    engine: FakeEngine
    start_error: str | None = None
    slow: bool = False
    dies_at: int | None = None
    hangs_at: int | None = None
    lively: bool = False
    clings: bool = False
    refuses: bool = False
    probes: int = 0
    _begun: int = 0
    ended: int = 0
    memory: set[str] = field(default_factory=lambda: {"weights", "cache"})
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    _death: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        if not self.slow:
            self.loaded.set()

    def die(self) -> None:
        self._death.set()

    async def start(self) -> int:
        await self.loaded.wait()
        if self.start_error is not None:
            raise EngineError(self.start_error)
        return 1000

    async def call(self, method: str, *arguments: Any) -> Any:
        calls: dict[str, Callable[..., Any]] = {
            "died": self._died,
            "health_check": self._show_life,
            "generate": self._generate,
            "version": self._version,
            "begin": self._begin,
            "commit": self._commit,
            "abort": self._abort,
            "release_memory": self._release,
            "restore_memory": self._restore,
        }
        if self._death.is_set():
            raise DeadEngineError(f"{self.name} is dead")
        return await calls[method](*arguments)

    def sink(self) -> Any:
        """What FakeTrainer (test_fleet.py) sends to."""
        return self

    async def end(self) -> None:
        self.ended += 1
        self.die()

    async def _died(self) -> str:
        await self._death.wait()
        return "its process ended"

    async def _version(self) -> int:
        return self.engine.version

    async def _begin(self, version: int, _manifest: Any) -> None:
        self._begun = version

    async def _commit(self) -> None:
        if self.refuses:
            raise EngineError(f"{self.name} refuses the weights")
        self.engine.version = self._begun

    async def _abort(self, _reason: str) -> None:
        pass

    async def _release(self) -> None:
        if self.clings:
            raise EngineError("it does not release its memory")
        self.memory = set()

    async def _restore(self, part: str) -> None:
        self.memory.add(part)

    async def _show_life(self) -> None:
        self.probes += 1
        if not self.lively:
            await asyncio.Event().wait()

    async def _generate(self, request: Any) -> Any:
        number = len(self.engine.requests) + 1
        if self.dies_at is not None and number >= self.dies_at:
            self.die()
        if self.hangs_at is not None and number >= self.hangs_at:
            await asyncio.Event().wait()
        output = await self.engine.generate(request)
        if self._death.is_set():
            raise DeadEngineError(f"{self.name} died while it answered")
        return output
