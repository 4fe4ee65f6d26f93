"""Carries the requests of many paths to an engine's actor and the answers back, many in one call of Ray.

A call of Ray costs both processes more than a request and its answer do. So the requests of one turn of the
event loop travel together, and so do the answers that the engine has when the driver asks for more. A
request's error, cancellation and loss with its actor are the same as those of a call of its own.
"""

import asyncio
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from ray.exceptions import RayTaskError

from treepo.protocols import GenerateOutput, GenerateRequest

Posted = Sequence[tuple[int, GenerateRequest]]
"""Requests with their numbers, which increase from one to the next."""
Answers = Sequence[tuple[int, GenerateOutput | RayTaskError]]


class RequestChannel:
    """The driver's end. actor: has `post` and `collect` of a RequestDesk."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[GenerateOutput]] = {}
        self._unsent: dict[int, GenerateRequest] = {}
        self._cancelled: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flushing = self._collecting = False

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Raises what the engine raised, as a RayTaskError, or RayActorError if the actor has died."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._unsent[number] = request
        self._flush_soon()
        try:
            return await answer
        finally:
            if self._waiting.pop(number, None) is not None:  # this call was cancelled
                self._cancelled.append(number)
                self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._unsent or self._cancelled:
            self._start(self._post(self._unsent, self._cancelled))
            self._unsent, self._cancelled = {}, []
        if self._waiting and not self._collecting:
            self._collecting = True
            self._start(self._collect())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def _post(self, requests: Mapping[int, GenerateRequest], cancelled: Sequence[int]) -> None:
        try:
            await self._actor.post.remote(list(requests.items()), cancelled)
        except Exception as error:  # of any kind: nobody else would hear of it, and the requests would wait
            self._fail(requests, error)

    async def _collect(self) -> None:
        """Hand out answers until no request waits for one."""
        try:
            while self._waiting:
                for number, answer in await self._actor.collect.remote():
                    if isinstance(answer, RayTaskError):
                        self._fail([number], answer)
                    elif (waiting := self._take(number)) is not None:
                        waiting.set_result(answer)
        except Exception as error:  # as above
            self._fail([*self._waiting], error)
        finally:
            self._collecting = False

    def _fail(self, numbers: Iterable[int], error: Exception) -> None:
        for number in numbers:
            if (waiting := self._take(number)) is not None:
                waiting.set_exception(error)

    def _take(self, number: int) -> asyncio.Future[GenerateOutput] | None:
        """The call that waits for this answer; None if it was cancelled, even if it does not know yet."""
        waiting = self._waiting.pop(number, None)
        return None if waiting is None or waiting.cancelled() else waiting


class RequestDesk:
    """The actor's end. generate: answers one request."""

    def __init__(self, generate: Callable[[GenerateRequest], Coroutine[Any, Any, GenerateOutput]]) -> None:
        self._generate = generate
        self._running: dict[int, asyncio.Task[GenerateOutput]] = {}
        self._answers: list[tuple[int, GenerateOutput | RayTaskError]] = []
        self._ready = asyncio.Event()
        self._newest = -1
        self._cancelled_early: set[int] = set()

    def post(self, requests: Posted, cancelled: Sequence[int]) -> None:
        """Begin the requests, and cancel others. Ray may exchange two calls of this."""
        for number, request in requests:
            self._newest = max(self._newest, number)
            if number in self._cancelled_early:
                self._cancelled_early.remove(number)
                continue
            task = self._running[number] = asyncio.create_task(self._generate(request))
            task.add_done_callback(lambda task, number=number: self._done(number, task))
        for number in cancelled:
            if number in self._running:
                self._running[number].cancel()
            elif number > self._newest:
                self._cancelled_early.add(number)

    async def collect(self) -> Answers:
        """Wait until there are answers, and take them. One call at a time."""
        await self._ready.wait()
        self._ready.clear()
        answers, self._answers = self._answers, []
        return answers

    def _done(self, number: int, task: asyncio.Task[GenerateOutput]) -> None:
        del self._running[number]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._answers.append((number, task.result()))
        else:
            text = "".join(traceback.format_exception(error))
            self._answers.append((number, RayTaskError("generate", text, error)))
        self._ready.set()
