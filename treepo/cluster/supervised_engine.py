"""One engine of a run, whichever process serves as it now: watched, and replaced when it is lost.

An engine is lost when its processes end, when it has answered nothing for `engine.health_seconds` and then
gives no sign of life within as long again, or when somebody who uses it says so (`fail`). Its processes are
ended then, a successor is started beside whatever else goes on, given the current weights, and admitted. How
often that may happen is bounded over the whole run.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from treepo.errors import DeadEngineError, EngineError, ModelError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.weight_sync.send import Sink

if TYPE_CHECKING:
    from treepo.cluster.engine_pool import Fleet

_log = logging.getLogger(__name__)


class EngineProcess(Protocol):
    """What starts, serves and ends: an engine without a successor."""

    name: str

    async def start(self) -> int:
        """Wait until the model is loaded; returns the tokens that the KV cache holds."""
        ...

    async def call(self, method: str, *arguments: object) -> Any:
        """The result of the engine's `method`. Raises DeadEngineError where the engine can answer no more."""
        ...

    def sink(self) -> Sink:
        """The same engine as the rank that sends weights sees it."""
        ...

    async def end(self) -> None:
        """End it, however it is. May be called again."""
        ...


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DOWN = "down"
    GIVEN_UP = "given up"


class SupervisedEngine[P: EngineProcess]:
    """Implements `treepo.protocols.Engine`. Made on a running loop.

    process: what serves, or will. reason: why the last one was lost; empty where none was.
    """

    def __init__(self, fleet: "Fleet[P]", launch: Callable[[], P], health_seconds: float) -> None:
        self.state = State.STARTING
        self.reason = ""
        self.process = launch()
        self.name = self.process.name
        self._fleet = fleet
        self._launch = launch
        self._health_seconds = health_seconds
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[str] = self._loop.create_future()
        self._outstanding = 0
        self._heard = 0.0  # the loop's time of the last answer, or of the first request after a rest

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Raises DeadEngineError at once while this engine is lost and another serves; waits where none
        does, and raises NoEngineError where none ever will.
        """
        if self.state is not State.SERVING:
            await self._fleet.until_serving(self)
        if not self._outstanding:
            self._heard = self._loop.time()
        self._outstanding += 1
        try:
            output = await self.call("generate", request)
        finally:
            self._outstanding -= 1
        self._heard = self._loop.time()
        return output

    async def call(self, method: str, *arguments: object) -> Any:
        """The result of the process's `method`; given up as soon as the engine is lost."""
        process, lost = self.process, self._lost
        answer = asyncio.ensure_future(process.call(method, *arguments))
        try:
            await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
        except DeadEngineError as error:
            if process is self.process:
                self._lose(str(error))
            raise
        finally:
            answer.cancel()
        raise DeadEngineError(f"{self.name}: {lost.result()}")

    def fail(self, reason: str) -> None:
        """Nothing more is asked of the process that serves, and a successor is started; nothing changes where
        none serves.
        """
        if self.state is State.SERVING:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)
            self.reason = reason
            self._enter(State.DOWN)

    def serve(self) -> None:
        """The process is loaded and has the current weights; nothing is changed where it is lost already."""
        if not self._lost.done():
            self._enter(State.SERVING)

    async def supervise(self) -> None:
        """Until the engine is given up."""
        while True:
            await self._until_lost()
            await self.process.end()
            if not self._fleet.take_restart():
                self._enter(State.GIVEN_UP)
                _log.error("%s is given up: %s", self.name, self.reason)
                return
            _log.warning("%s is restarted: %s", self.name, self.reason)
            try:
                await self._start_successor()
            except (EngineError, ModelError) as error:
                self._lose(str(error))

    async def _start_successor(self) -> None:
        fleet = self._fleet
        async with AsyncExitStack() as stack:
            if fleet.shares_device:
                await stack.enter_async_context(fleet.weights)
            self.process = self._launch()
            self._lost = self._loop.create_future()
            self._heard = self._loop.time()
            self._enter(State.STARTING)
            await fleet.start(self.process)
            if not fleet.shares_device:
                await stack.enter_async_context(fleet.weights)
            if fleet.restore is not None:
                await fleet.restore(self.process)
            self.serve()
        _log.warning("%s serves again", self.name)

    async def _until_lost(self) -> None:
        died = asyncio.ensure_future(self.process.call("died"))
        try:
            while not self._lost.done():
                left = self._health_seconds - self._quiet_seconds()
                if left <= 0:
                    await self._look_for_life()
                    continue
                await asyncio.wait((died, self._lost), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    self._lose(_reason(died))
        finally:
            died.cancel()

    def _quiet_seconds(self) -> float:
        """How long requests have waited without any answer. Nothing is answered while weights change, and
        an update has deadlines of its own.
        """
        if not self._outstanding or self._fleet.weights.locked():
            return 0.0
        return self._loop.time() - self._heard

    async def _look_for_life(self) -> None:
        try:
            async with asyncio.timeout(self._health_seconds):
                await self.process.call("health_check")
        except TimeoutError:
            self._lose(f"no sign of life for {2 * self._health_seconds:g} s")
        except EngineError as error:
            self._lose(str(error))
        else:
            self._heard = self._loop.time()

    def _enter(self, state: State) -> None:
        self.state = state
        self._fleet.changed()


def _reason(died: "asyncio.Future[str]") -> str:
    error = died.exception()
    return died.result() if error is None else str(error)
