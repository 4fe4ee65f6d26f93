"""One engine of a pool: it keeps its name and its index when its process is lost and replaced.

An engine is lost when its process ends, when the pool reports a failure (`fail`), or when its requests have
waited for `engine.health_seconds` without any answer and it then fails a health check of the same length.
`treepo.cluster.engine_pool` decides what happens next.
"""

import asyncio
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, Literal, Protocol

from treepo.errors import DeadEngineError, EngineError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.weight_sync.send import WeightSink
from treepo.weight_sync.transaction import ReceivingEngine
from treepo.weight_sync.wire import Manifest

Memory = Literal["weights", "cache"]
"""The two parts of an engine's device memory that can be reloaded one after the other."""


class EngineProcess(ReceivingEngine, Protocol):
    """One process of an engine. Every method raises DeadEngineError if the process can no longer answer."""

    async def start(self) -> int:
        """Wait until the model is loaded; returns the number of tokens that the KV cache holds."""
        ...

    async def generate(self, request: GenerateRequest) -> GenerateOutput: ...

    async def health_check(self) -> None:
        """Return as soon as the engine answers anything. Raises EngineError if it refuses."""
        ...

    async def wait_for_death(self) -> str:
        """Return the reason once the engine can no longer answer."""
        ...

    async def hold(self) -> None:
        """Interrupt running requests and make later ones wait until `release`, also beyond a weight sync;
        return once none is running.
        """
        ...

    async def release(self) -> None: ...

    async def offload(self) -> None:
        """Release the device memory. Only while the engine is held; reload all of it before the release."""
        ...

    async def reload(self, memory: Memory) -> None: ...

    async def end(self) -> None:
        """End the process in any state. May be called again."""
        ...


class Supervisor(Protocol):
    """The pool, as its engines see it."""

    def state_changed(self) -> None: ...

    def suspends_health_checks(self) -> bool:
        """Whether the engines answer no request, because they are held or take weights."""
        ...

    async def wait_to_serve(self, engine: "PooledEngine[Any]") -> None:
        """Return when `engine` serves. Raises DeadEngineError as soon as another engine does."""
        ...


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DOWN = "down"
    GIVEN_UP = "given up"


class PooledEngine[P: EngineProcess]:
    """Implements `treepo.protocols.Engine` and `ReceivingEngine`. Construct it on a running loop.

    process: the current one. reason: why the previous process was lost; empty if none was.
    """

    def __init__(self, launch: Callable[[], P], supervisor: Supervisor, health_seconds: float) -> None:
        self.state = State.STARTING
        self.reason = ""
        self.process = launch()
        self._launch = launch
        self._supervisor = supervisor
        self._health_seconds = health_seconds
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[str] = self._loop.create_future()
        self._offloaded: set[Memory] = set()
        self._outstanding = 0
        self._last_answer = 0.0  # the loop's time, or that of the first request after an idle time

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def status(self) -> str:
        if self.state is State.SERVING or not self.reason:
            return self.state.value
        return f"{self.state.value}: {self.reason}"

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Sample. If the engine is lost and no other serves, wait for one that does.

        Raises DeadEngineError if the engine is lost and another serves, NoEngineError if all are given up.
        """
        if self.state is not State.SERVING:
            await self._supervisor.wait_to_serve(self)
        if not self._outstanding:
            self._last_answer = self._loop.time()
        self._outstanding += 1
        try:
            output = await self._answer(self.process.generate(request))
        finally:
            self._outstanding -= 1
        self._last_answer = self._loop.time()
        return output

    async def begin(self, version: int, manifest: Manifest) -> None:
        await self._answer(self._serving_process().begin(version, manifest))

    async def commit(self) -> None:
        await self._answer(self._serving_process().commit())

    async def abort(self, reason: str) -> None:
        await self._answer(self._serving_process().abort(reason))

    def sink(self) -> WeightSink:
        return self.process.sink()

    async def hold(self) -> None:
        await self._answer(self._serving_process().hold())

    async def release(self) -> None:
        await self._answer(self._serving_process().release())

    async def offload(self) -> None:
        await self._answer(self._serving_process().offload())
        self._offloaded |= {"weights", "cache"}

    async def reload(self, memory: Memory) -> None:
        await self._answer(self._serving_process().reload(memory))
        self._offloaded.discard(memory)

    async def reload_all(self) -> None:
        """Take back whatever memory is still offloaded."""
        for memory in ("weights", "cache"):
            if memory in self._offloaded:
                await self.reload(memory)

    def restart_clock(self) -> None:
        """Count the silence of running requests from now on: until now the engine could not answer."""
        self._last_answer = self._loop.time()

    def fail(self, reason: str) -> None:
        """Stop using the process, so that it is replaced. Does nothing if the engine does not serve."""
        if self.state is State.SERVING:
            self.lose(reason)

    def lose(self, reason: str) -> None:
        """As `fail`, in any state. Only the pool calls it."""
        if not self._lost.done():
            self._lost.set_result(reason)
            self.reason = reason
            self._enter(State.DOWN)

    def serve(self) -> None:
        """Accept requests: the process is loaded and has the current weights. Does nothing if it is lost."""
        if not self._lost.done():
            self._enter(State.SERVING)

    def replace_process(self) -> None:
        """Launch another process; the engine serves once the pool says so."""
        self.process = self._launch()
        self._offloaded = set()
        self._lost = self._loop.create_future()
        self._last_answer = self._loop.time()
        self._enter(State.STARTING)

    def give_up(self) -> None:
        self._enter(State.GIVEN_UP)

    async def watch(self) -> None:
        """Return once the process is lost."""
        died = asyncio.ensure_future(self.process.wait_for_death())
        try:
            while not self._lost.done():
                left = self._health_seconds - self._silent_seconds()
                if left <= 0:
                    await self._check_health()
                    continue
                await asyncio.wait((died, self._lost), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    error = died.exception()
                    self.lose(died.result() if error is None else str(error))
        finally:
            died.cancel()

    def _serving_process(self) -> P:
        """The process that serves. A process that replaced it during an update has not begun that update."""
        if self.state is not State.SERVING:
            raise DeadEngineError(f"{self.name} is {self.status}")
        return self.process

    async def _answer[T](self, work: Coroutine[Any, Any, T]) -> T:
        """The process's answer. Raises DeadEngineError as soon as the process is lost."""
        process, lost = self.process, self._lost
        answer = asyncio.ensure_future(work)
        try:
            await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
        except DeadEngineError as error:
            if process is self.process:
                self.lose(str(error))
            raise
        finally:
            answer.cancel()
        raise DeadEngineError(f"{self.name}: {lost.result()}")

    def _silent_seconds(self) -> float:
        """How long requests have waited without any answer, apart from holds and weight syncs, which have
        deadlines of their own.
        """
        if not self._outstanding or self._supervisor.suspends_health_checks():
            return 0.0
        return self._loop.time() - self._last_answer

    async def _check_health(self) -> None:
        try:
            async with asyncio.timeout(self._health_seconds):
                await self.process.health_check()
        except TimeoutError:
            self.lose(f"no answer for {2 * self._health_seconds:g} s, and none to a health check")
        except EngineError as error:
            self.lose(str(error))
        else:
            self._last_answer = self._loop.time()

    def _enter(self, state: State) -> None:
        self.state = state
        self._supervisor.state_changed()
