"""Requests that travel together to an actor are answered, fail, end and are lost one by one."""

import asyncio
import pickle
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError

from treepo.cluster.ray_engine import RayEngine
from treepo.cluster.request_channel import RequestChannel, RequestDesk
from treepo.errors import ActorError, DeadEngineError, EngineError
from treepo.protocols import GenerateOutput, GenerateRequest


def request(number: int) -> GenerateRequest:
    return GenerateRequest(np.arange(number + 1, dtype=np.int32), 1, 4, 1.0, seed=number)


def output(number: int) -> GenerateOutput:
    return GenerateOutput(np.full(4, number, np.int32), np.zeros(4, np.float32), 0, "length", 0)


class Engine:
    """Answers after as many turns of the loop as `turns` says; -1: never. Requests with `faults` fail."""

    def __init__(
        self, turns: Callable[[int], int] = lambda _: 0, faults: dict[int, Exception] | None = None
    ) -> None:
        self.turns, self.faults = turns, faults or {}
        self.began: list[int] = []
        self.cancelled: list[int] = []

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        number = request.seed
        assert len(request.context) == number + 1
        self.began.append(number)
        try:
            left = self.turns(number)
            while left:
                left -= 1
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        if number in self.faults:
            raise self.faults[number]
        return output(number)


class LocalActor:
    """Behaves as Ray's handle of an actor with a desk. delay: turns of the loop before a call begins."""

    def __init__(self, engine: Engine, delay: Callable[[], int] = lambda: 1) -> None:
        self.desk = RequestDesk(engine.generate)
        self.delay = delay
        self.posted: list[list[int]] = []
        self.died: asyncio.Future[None] | None = None

    def __getattr__(self, name: str) -> "LocalActor.Method":
        return self.Method(self, name)

    class Method:
        def __init__(self, actor: "LocalActor", name: str) -> None:
            self.actor, self.name = actor, name

        def remote(self, *arguments: Any) -> Awaitable[Any]:
            return asyncio.ensure_future(self.actor.call(self.name, pickle.dumps(arguments)))

    async def call(self, name: str, message: bytes) -> Any:
        self.died = self.died or asyncio.get_running_loop().create_future()
        for _ in range(self.delay()):
            await asyncio.sleep(0)
        work = asyncio.ensure_future(self._call(name, pickle.loads(message)))
        await asyncio.wait((work, self.died), return_when=asyncio.FIRST_COMPLETED)
        if self.died.done():
            work.cancel()
            raise ActorDiedError
        return pickle.loads(pickle.dumps(await work))

    async def _call(self, name: str, arguments: Any) -> Any:
        if name == "collect":
            return await self.desk.collect()
        self.posted.append([number for number, _ in arguments[0]])
        return self.desk.post(*arguments)


def test_an_answer_to_a_call_that_was_cancelled_in_the_same_turn_is_dropped() -> None:
    """The future is cancelled at once, its call learns of it a turn later."""

    class Actor(LocalActor):
        async def call(self, name: str, message: bytes) -> Any:
            answers = await super().call(name, message)
            if name == "collect":
                cancelled.cancel()
            return answers

    async def sample() -> None:
        nonlocal cancelled
        channel = RequestChannel(Actor(Engine()))
        cancelled = asyncio.ensure_future(channel.generate(request(0)))
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert (await asyncio.wait_for(channel.generate(request(1)), 60)).tokens.tolist() == [1] * 4

    cancelled: asyncio.Future[GenerateOutput]
    asyncio.run(sample())


def test_every_request_gets_its_own_answer() -> None:
    drawn = random.Random(0)
    actor = LocalActor(Engine(lambda _: drawn.randrange(9)), lambda: drawn.randrange(5))

    async def sample() -> None:
        channel = RequestChannel(actor)

        async def path(start: int) -> None:
            for number in range(start, start + 5):
                for _ in range(drawn.randrange(4)):
                    await asyncio.sleep(0)
                answer = await channel.generate(request(number))
                assert answer.tokens.tolist() == [number] * 4

        await asyncio.gather(*(path(10 * start) for start in range(30)))

    asyncio.run(sample())


def test_requests_of_one_turn_travel_in_one_call() -> None:
    actor = LocalActor(Engine())

    async def sample() -> None:
        channel = RequestChannel(actor)
        await asyncio.gather(*(channel.generate(request(number)) for number in range(20)))
        await asyncio.gather(*(channel.generate(request(number)) for number in range(3)))

    asyncio.run(sample())
    assert actor.posted == [[*range(20)], [20, 21, 22]]


def test_an_error_is_that_of_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(faults={1: EngineError("refused"), 2: KeyError("a bug")})

    async def sample() -> list[Any]:
        ray_engine = RayEngine("engine 3", LocalActor(engine), ranks=1)
        calls = (ray_engine.generate(request(number)) for number in range(4))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, refused, bug, last = asyncio.run(sample())
    assert (first.tokens[0], last.tokens[0]) == (0, 3)
    assert type(refused) is EngineError
    assert str(refused) == "engine 3: refused"
    assert isinstance(bug, ActorError)
    assert "engine 3: KeyError: 'a bug'" in str(bug)
    assert "in generate" in caplog.text  # its traceback


def test_a_request_that_is_cancelled_ends_in_the_engine_and_no_other_does() -> None:
    engine = Engine(lambda number: -1 if number else 20)

    async def sample() -> None:
        channel = RequestChannel(LocalActor(engine))
        tasks = [asyncio.create_task(channel.generate(request(number))) for number in range(3)]
        while len(engine.began) < 3:
            await asyncio.sleep(0)
        tasks[1].cancel()
        assert (await tasks[0]).tokens[0] == 0
        assert engine.cancelled == [1]
        assert not tasks[2].done()
        late = await channel.generate(request(0))  # the channel still works
        assert late.tokens[0] == 0
        tasks[2].cancel()
        await asyncio.wait(tasks)
        while engine.cancelled != [1, 2]:
            await asyncio.sleep(0)

    asyncio.run(sample())


def test_a_request_may_be_cancelled_while_its_answer_arrives() -> None:
    """In every order of the two, and the other requests are answered."""

    async def sample(turns: int) -> None:
        channel = RequestChannel(LocalActor(Engine()))
        ended = asyncio.create_task(channel.generate(request(1)))
        stays = asyncio.create_task(channel.generate(request(2)))
        for _ in range(turns):
            await asyncio.sleep(0)
        ended.cancel()
        assert (await stays).tokens[0] == 2
        assert (await channel.generate(request(3))).tokens[0] == 3

    for turns in range(30):
        asyncio.run(sample(turns))


def test_a_cancellation_may_overtake_its_request() -> None:
    engine = Engine()

    async def overtaken() -> None:
        desk = RequestDesk(engine.generate)
        desk.post([], [4])
        desk.post([(3, request(3)), (4, request(4))], [])
        ((number, _),) = await desk.collect()
        assert number == 3

    asyncio.run(overtaken())
    assert engine.began == [3]


def test_all_requests_are_lost_with_the_actor() -> None:
    actor = LocalActor(Engine(lambda _: -1))

    async def sample() -> list[Any]:
        ray_engine = RayEngine("engine 3", actor, ranks=1)
        calls = [asyncio.create_task(ray_engine.generate(request(number))) for number in range(3)]
        while not actor.posted:
            await asyncio.sleep(0)
        assert actor.died is not None
        actor.died.set_result(None)
        return [*await asyncio.gather(*calls, ray_engine.generate(request(3)), return_exceptions=True)]

    for error in asyncio.run(sample()):
        assert type(error) is DeadEngineError
        assert str(error).startswith("engine 3: it died: ")


class Desked:
    """An actor as the engine's: the second request never ends."""

    def __init__(self) -> None:
        self._desk = RequestDesk(Engine(lambda number: -1 if number == 1 else 0).generate)

    async def post(self, *arguments: Any) -> None:
        self._desk.post(*arguments)

    async def collect(self) -> Any:
        return await self._desk.collect()


@pytest.mark.slow
def test_ray_s_own_actors_answer_and_die_likewise() -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actor: Any = ray.remote(Desked)
        handle = actor.options(max_concurrency=1000).remote()

        async def sample() -> None:
            engine = RayEngine("engine 3", handle, ranks=1)
            answers = await asyncio.gather(*(engine.generate(request(number)) for number in range(2, 300)))
            assert [int(answer.tokens[0]) for answer in answers] == [*range(2, 300)]
            endless = asyncio.create_task(engine.generate(request(1)))
            assert (await engine.generate(request(0))).tokens[0] == 0
            ray.kill(handle)
            with pytest.raises(DeadEngineError, match="engine 3: it died"):
                await endless

        asyncio.run(sample())
    finally:
        ray.shutdown()
