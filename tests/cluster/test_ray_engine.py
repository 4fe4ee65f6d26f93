"""Engines behind Ray actors: an error there is one line here that names the engine and the cause."""

import asyncio
import os
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from treepo.cluster import engine_share
from treepo.cluster.engine_share import Share
from treepo.cluster.ray_engine import HostedEngine, RayEngine, RaySink, engine_seed
from treepo.config.engine import EngineConfig
from treepo.errors import ActorError, DeadEngineError, EngineError, ModelError, TransportError, TreepoError
from treepo.weight_sync.wire import Bucket


class FailingCall:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def __await__(self) -> Generator[None]:
        raise self._error
        yield

    def future(self) -> "Future[None]":
        failed: Future[None] = Future()
        failed.set_exception(self._error)
        return failed


class FailingMethod:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def remote(self, *_arguments: object) -> FailingCall:
        return FailingCall(self._error)


class FailingActor:
    """A Ray actor whose every method fails with `error`."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, _method: str) -> FailingMethod:
        return FailingMethod(self._error)


def raised_by(error: Exception) -> BaseException:
    engine = RayEngine("engine 3", FailingActor(error), ranks=1)
    with pytest.raises((TreepoError, RayTaskError)) as raised:
        asyncio.run(engine.start())
    return raised.value


def in_task(cause: Exception) -> RayTaskError:
    return RayTaskError("capacity", "a traceback\nof many lines", cause)


def raised_to_the_sender(error: Exception) -> BaseException | None:
    return RaySink("engine 3", "key", 1, FailingActor(error)).load([Bucket((), (), None)]).exception()


@pytest.mark.parametrize("kind", [EngineError, ModelError, TransportError])
def test_our_own_errors_arrive_with_the_engine_s_name(kind: type[TreepoError]) -> None:
    error = raised_by(in_task(kind("models/x: no weights")))
    assert type(error) is kind
    assert str(error) == "engine 3: models/x: no weights"


def test_the_rank_that_sends_gets_our_own_errors_too() -> None:
    cause = TransportError("the sender is gone")
    assert raised_to_the_sender(in_task(cause)) is cause
    assert isinstance(raised_to_the_sender(ActorDiedError()), DeadEngineError)


@pytest.mark.parametrize(
    "cause",
    [KeyError("a bug"), FloatingPointError("\x1b[36mnan\x1b[39m"), OSError(28, "full")],
)
def test_a_fault_is_one_line_and_its_traceback_is_logged(
    cause: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (raised_by(in_task(cause)), raised_to_the_sender(in_task(cause))):
        assert isinstance(error, ActorError)
        assert type(cause).__name__ in str(error)
        assert f"process {os.getpid()} on " in str(error)
        assert "\n" not in str(error)
        assert "\x1b" not in str(error)
    assert caplog.text.count("of many lines") == 2


def test_a_fault_that_cannot_be_pickled_is_the_last_line_of_its_traceback() -> None:
    fault = RayTaskError(
        "capacity", "\x1b[36mray::f()\x1b[39m\n  File x\nmodule.Odd: \x1b[1mwhy\x1b[0m\n", None
    )
    assert str(raised_by(fault)).startswith("engine 3: module.Odd: why (process ")


def test_an_actor_that_died_is_one_line() -> None:
    error = raised_by(ActorDiedError(in_task(MemoryError("killed"))))
    assert isinstance(error, DeadEngineError)
    assert str(error).startswith("engine 3: it died: ")
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("make", [lambda folder: folder, lambda folder: folder / "nowhere"])
def test_an_engine_that_cannot_start_says_why_when_it_is_asked_for_its_capacity(
    tmp_path: Path, make: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # else the engine sets it, for the rest of this process
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    engine: Any = HostedEngine(make(tmp_path), "float32", EngineConfig(), seed=0)
    with pytest.raises(ModelError, match=str(make(tmp_path))):
        engine.capacity()
    engine.close()


def test_an_engine_that_does_not_close_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[object] = []
    monkeypatch.setattr(engine_share.ray, "kill", killed.append)
    for error in (KeyError("a bug"), EngineError("SGLang does not end"), TimeoutError()):
        engine = RayEngine("engine 3", FailingActor(in_task(error)), ranks=1)
        engine._started = True
        asyncio.run(engine.end())
        assert killed.pop() is engine.actor
    assert caplog.text.count("engine 3 did not close and is killed: ") == 3


class ScriptedCall:
    """A call of a Ray actor that is answered at once, or never."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def __await__(self) -> Generator[Any, None, object]:
        if self._answer is None:
            yield from asyncio.Future[None]().__await__()
        return self._answer


class ScriptedActor:
    """A Ray actor whose methods give these answers, and never answer otherwise."""

    def __init__(self, **answers: object) -> None:
        self._answers = answers

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: ScriptedCall(self._answers.get(method)))


def test_an_engine_starts_when_all_its_shares_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_share.ray, "cancel", lambda _: None)
    first = ScriptedActor(capacity=1000)
    for further, started in ((ScriptedActor(ready=True), True), (ScriptedActor(), False)):
        engine = RayEngine("engine 3", first, 4, [Share("engine 3, share 1", further)])

        async def start(engine: RayEngine = engine) -> int:
            return await asyncio.wait_for(engine.start(), 0.05)

        if started:
            assert asyncio.run(start()) == 1000
        else:
            with pytest.raises(TimeoutError):
                asyncio.run(start())


def test_a_share_that_cannot_start_ends_the_start_of_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_share.ray, "cancel", lambda _: None)
    refuses = FailingActor(in_task(EngineError("SGLang does not start on models/x")))
    engine = RayEngine("engine 3", ScriptedActor(), 4, [Share("engine 3, share 1", refuses)])
    with pytest.raises(EngineError, match="engine 3, share 1: SGLang does not start on models/x"):
        asyncio.run(engine.start())


def test_the_death_of_any_share_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_share.ray, "cancel", lambda _: None)
    dies = ScriptedActor(died="SGLang's process 7 ended", last_lines="killed")
    for first, further in ((dies, ScriptedActor()), (ScriptedActor(), dies)):
        engine = RayEngine("engine 3", first, 4, [Share("engine 3, share 1", further)])
        reason = asyncio.run(engine.wait_for_death())
        assert "SGLang's process 7 ended; killed" in reason
        assert reason.startswith("share 1: ") == (further is dies)
    gone = FailingActor(ActorDiedError())
    engine = RayEngine("engine 3", ScriptedActor(), 4, [Share("engine 3, share 1", gone)])
    with pytest.raises(DeadEngineError, match="engine 3, share 1: it died"):
        asyncio.run(engine.wait_for_death())


def test_an_engine_ends_with_all_its_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[object] = []
    monkeypatch.setattr(engine_share.ray, "kill", killed.append)
    actors = ScriptedActor(), ScriptedActor()
    asyncio.run(RayEngine("engine 3", actors[0], 4, [Share("engine 3, share 1", actors[1])]).end())
    assert killed == list(actors)


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, 2**32, 2**64, 10**40])
def test_an_engine_s_seed_fits_whatever_the_run_s_is(seed: int) -> None:
    seeds = [engine_seed(seed, index) for index in range(4)]
    assert len(set(seeds)) == 4
    assert all(0 <= value < 2**31 for value in seeds)
    assert seeds == [engine_seed(seed, index) for index in range(4)]
