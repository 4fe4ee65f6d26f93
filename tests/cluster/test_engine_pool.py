"""Engines that die, hang and fail to start: the pool loses no tree, and says when no engine is left."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from tests.support.fake_process import FakeProcess
from tests.support.sampling_policies import sampling
from treepo.cluster.engine_pool import EnginePool
from treepo.cluster.pooled_engine import PooledEngine, State
from treepo.cluster.training_engine_pool import TrainingEnginePool
from treepo.config.engine import EngineConfig
from treepo.data.prompts import Prompt
from treepo.errors import (
    DeadEngineError,
    EngineError,
    NoEngineError,
    PlacementError,
    TransportError,
    WeightsRefusedError,
)
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.protocols import GenerateRequest
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.watchdog import watched
from treepo.tree import Tree, to_json
from treepo.weight_sync.send import Outcome

type FakePool = TrainingEnginePool[FakeProcess]
REJOIN_SECONDS = 1800
REQUEST = GenerateRequest(np.array([5, 6], np.int32), 2, 4, 1.0, 0)


class Fakes:
    """Launches fake processes and keeps them all: `made[i]` are those of engine i, the oldest first.

    each: the settings of the n-th process of engine i. lost: the engines whose node is lost, with an event
    that brings other devices.
    """

    def __init__(self, each: Callable[[int, int], dict[str, Any]] = lambda _index, _number: {}) -> None:
        self.made: dict[int, list[FakeProcess]] = {}
        self.lost: dict[int, asyncio.Event] = {}
        self._each = each

    def __call__(self, index: int) -> FakeProcess:
        processes = self.made.setdefault(index, [])
        engine = FakeEngine(end=0.04, box=0.02, shuffle=index)
        process = FakeProcess(f"engine {index}", engine, **self._each(index, len(processes)))
        processes.append(process)
        return process

    async def find_devices(self, index: int) -> None:
        if index in self.lost:
            try:
                await asyncio.wait_for(self.lost[index].wait(), REJOIN_SECONDS)
            except TimeoutError:
                raise PlacementError("no node has had free devices") from None
            del self.lost[index]

    async def devices_lost(self, index: int) -> None:
        while index not in self.lost:
            await asyncio.sleep(1)


async def nothing(_version: int) -> None: ...


class FakeTrainer:
    """Implements `treepo.cluster.training_engine_pool.ColocatedTrainer` and sends nothing.

    happens: awaited with the version whenever weights are sent. moves: called with the name of each move of
    the trainer's memory. sent: the versions.
    """

    def __init__(
        self,
        happens: Callable[[int], Awaitable[None]] = nothing,
        moves: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.sent: list[int] = []
        self._happens, self._moves = happens, moves

    async def manifest(self) -> tuple[()]:
        return ()

    async def send_weights(self, version: int, sinks: Sequence[Any]) -> Outcome:
        del sinks
        self.sent.append(version)
        await self._happens(version)
        return Outcome()

    async def offload(self, weights: bool) -> None:
        self._moves("offload all" if weights else "offload")

    async def reload(self) -> None:
        self._moves("reload")

    async def release_cache(self) -> None:
        self._moves("release cache")


def run(
    scenario: Callable[[FakePool, Fakes], Any],
    fakes: Fakes | None = None,
    count: int = 1,
    trainer: FakeTrainer | None = None,
    shares_devices: bool = False,
    sampling_goes_on: bool = False,
    limit: float = 200,
    **settings: Any,
) -> None:
    """Run the scenario on a pool that is ready, in virtual time of at most `limit` seconds; every process is
    ended afterwards.
    """

    async def main() -> None:
        launch = fakes or Fakes()
        config = EngineConfig.model_validate({"count": count} | settings)
        pool = TrainingEnginePool(launch, config, trainer or FakeTrainer(), shares_devices, sampling_goes_on)
        try:
            await pool.ready()
            async with asyncio.timeout(limit):
                await scenario(pool, launch)
        finally:
            await pool.close()
        assert all(process.ended for processes in launch.made.values() for process in processes)

    run_virtually(main())


async def sync(pool: FakePool, version: int) -> None:
    async with pool.training():
        await pool.sync_weights(version)


def versions(fakes: Fakes) -> list[int]:
    """What the newest process of each engine serves."""
    return [fakes.made[index][-1].engine.version for index in sorted(fakes.made)]


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)  # of virtual time, so that deadlines come


async def let_others_run() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def serves(engine: PooledEngine[FakeProcess]) -> Callable[[], bool]:
    return lambda: engine.state is State.SERVING


async def trees(pool: FakePool, count: int) -> list[str]:
    """Trees that the pool samples, as JSON lines; none may fail."""
    prompts = [Prompt(f"train:{i}", prompt_tokens(i), "", "", "") for i in range(count)]
    driver = TreeDriver(pool.engines, sampling(retry_seconds=0.0, attempts=12), decode, seed=7)
    async with aclosing(driver.sample(prompts, step=0)) as results:
        finished: list[Tree | FailedTree] = [result async for result in results]
    assert not [result for result in finished if isinstance(result, FailedTree)]
    return sorted(to_json(tree).decode() for tree in finished if isinstance(tree, Tree))


def undisturbed(count: int) -> list[str]:
    found: list[str] = []

    async def scenario(pool: FakePool, _: Fakes) -> None:
        found.extend(await trees(pool, count))

    run(scenario)
    return found


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_deaths_lose_no_tree_and_change_none(engines: int) -> None:
    """Every process but the third of each engine dies after a while. The trees are those of an engine that
    lives, token for token: a finished segment is never sampled again under another context.
    """
    fakes = Fakes(lambda index, number: {"dies_at": 7 + 11 * index + 5 * number if number < 2 else None})

    async def scenario(pool: FakePool, _: Fakes) -> None:
        assert await trees(pool, 12) == undisturbed_trees

    undisturbed_trees = undisturbed(12)
    run(scenario, fakes, engines, max_restarts=2 * engines)
    assert all(len(processes) > 1 for processes in fakes.made.values())


def test_a_request_waits_for_a_restart_only_if_no_other_engine_serves() -> None:
    fakes = Fakes(
        lambda index, number: {"hangs_at": 1} if number == 0 and index == 0 else {"slow": number > 0}
    )

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        first, second = pool.engines
        lost = asyncio.ensure_future(first.generate(REQUEST))
        await until(lambda: fakes.made[0][0].requests == 1)
        first.fail("it was lost")
        with pytest.raises(DeadEngineError, match="it was lost"):
            await lost
        with pytest.raises(DeadEngineError, match=r"engine 0 is .*: it was lost"):
            await first.generate(REQUEST)
        second.fail("so was this one")
        one, other = (asyncio.ensure_future(engine.generate(REQUEST)) for engine in pool.engines)
        await until(lambda: all(len(fakes.made[index]) == 2 for index in (0, 1)))
        await let_others_run()
        assert not one.done()
        assert not other.done()
        fakes.made[1][1].loaded.set()
        assert len((await other).tokens)
        with pytest.raises(DeadEngineError, match="engine 0 is starting: it was lost"):
            await one

    run(scenario, fakes, count=2)


def test_a_restarted_engine_serves_only_after_it_has_the_weights_and_nobody_changes_them_meanwhile() -> None:
    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        pools.append(pool)
        (engine,) = pool.engines
        await sync(pool, 3)
        async with pool.training():
            fakes.made[0][0].die()
            await until(lambda: len(fakes.made[0]) == 2)
            waiting = asyncio.ensure_future(engine.generate(REQUEST))
            await let_others_run()
            assert trainer.sent == [3]
            await pool.sync_weights(4)
            assert trainer.sent == [3], "no engine serves"
        assert (await waiting).version == 4
        assert trainer.sent == [3, 4]

    async def happens(_version: int) -> None:
        states.append(pools[0].engines[0].state)

    states: list[State] = []
    pools: list[FakePool] = []
    trainer = FakeTrainer(happens)

    run(scenario, trainer=trainer)
    assert states == [State.SERVING, State.STARTING]


def test_silence_is_death_but_work_is_not() -> None:
    """Neither engine answers a request; the one that passes health checks is left alone."""
    fakes = Fakes(lambda index, number: {"hangs_at": 1, "healthy": index == 1} if not number else {})

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        silent, busy = pool.engines
        working = asyncio.ensure_future(busy.generate(REQUEST))
        with pytest.raises(DeadEngineError, match="none to a health check"):
            await silent.generate(REQUEST)
        await until(serves(silent))
        await until(lambda: fakes.made[1][0].health_checks > 3)
        assert busy.state is State.SERVING
        assert not working.done()
        working.cancel()

    run(scenario, fakes, 2, health_seconds=1)
    assert [len(fakes.made[index]) for index in (0, 1)] == [2, 1]


def test_an_engine_without_a_request_gets_no_health_check() -> None:
    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        (engine,) = pool.engines
        await engine.generate(REQUEST)
        (process,) = fakes.made[0]
        await asyncio.sleep(10)
        assert process.health_checks == 0

    run(scenario, Fakes(lambda _, __: {"healthy": True}), health_seconds=1)


def test_restarts_are_bounded_over_the_run_and_the_rest_goes_on() -> None:
    fakes = Fakes(lambda index, number: {"start_error": "no memory"} if index == 0 and number else {})

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        first, second = pool.engines
        fakes.made[0][0].die()
        await until(lambda: first.state is State.GIVEN_UP)
        assert len(fakes.made[0]) == 4
        assert first.reason == "no memory"
        assert len(await trees(pool, 4)) == 4
        fakes.made[1][0].die()
        await until(lambda: second.state is State.GIVEN_UP)
        with pytest.raises(NoEngineError, match=r"no engine is left: engine 0 .*no memory; engine 1 .*ended"):
            await second.generate(REQUEST)
        with pytest.raises(ExceptionGroup) as raised:
            await trees(pool, 4)
        assert raised.group_contains(NoEngineError)

    run(scenario, fakes, 2, max_restarts=3)


def test_an_engine_whose_node_is_lost_waits_for_devices_and_the_others_go_on() -> None:
    """Longer than an engine may take to start; it costs one restart, once there are devices."""

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        first, second = pool.engines
        back = fakes.lost[0] = asyncio.Event()
        fakes.made[0][0].die()
        await until(lambda: first.state is State.DOWN)
        assert len(await trees(pool, 4)) == 4
        second.fail("it is lost too, but its node is not")
        await until(serves(second))
        await asyncio.sleep(100)
        assert (first.state, pool.restarts, len(fakes.made[0])) == (State.DOWN, 1, 1)
        back.set()
        await until(serves(first))
        assert pool.restarts == 2

    run(scenario, count=2, start_seconds=20, max_restarts=2)


def test_a_request_waits_while_the_only_engine_waits_for_devices() -> None:
    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        (engine,) = pool.engines
        back = fakes.lost[0] = asyncio.Event()
        fakes.made[0][0].die()
        await until(lambda: engine.state is State.DOWN)
        waiting = asyncio.ensure_future(engine.generate(REQUEST))
        await asyncio.sleep(55)
        assert not waiting.done()
        back.set()
        assert len((await waiting).tokens)

    run(scenario, start_seconds=10)


def test_an_engine_without_devices_by_the_deadline_is_given_up() -> None:
    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        (engine,) = pool.engines
        fakes.lost[0] = asyncio.Event()
        fakes.made[0][0].die()
        await until(lambda: engine.state is State.DOWN)
        with pytest.raises(
            NoEngineError, match="engine 0 is given up: its process ended; no node has had free"
        ):
            await engine.generate(REQUEST)
        assert pool.restarts == 0

    run(scenario, limit=3600)


def test_an_engine_whose_node_is_lost_while_it_starts_is_started_elsewhere() -> None:
    fakes = Fakes(lambda _, number: {"slow": number == 1})

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        (engine,) = pool.engines
        fakes.made[0][0].die()
        await until(lambda: len(fakes.made[0]) == 2)
        back = fakes.lost[0] = asyncio.Event()
        await until(lambda: engine.reason.endswith("its node left the cluster while it started"))
        back.set()
        await until(serves(engine))
        assert len(fakes.made[0]) == 3

    run(scenario, fakes)


def test_a_failed_update_costs_a_restart_and_another_fault_ends_the_requests_that_wait() -> None:
    errors: list[Exception] = [EngineError("refused"), ValueError("a fault of ours")]

    async def happens(version: int) -> None:
        if version == 1 and trainer.sent != [1]:
            raise errors.pop(0)

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        await sync(pool, 1)
        fakes.made[0][0].die()
        await until(lambda: pool.engines[0].state is not State.SERVING)
        with pytest.raises(ValueError, match="a fault of ours"):
            await pool.engines[0].generate(REQUEST)
        assert len(fakes.made[0]) == 3

    trainer = FakeTrainer(happens)
    run(scenario, trainer=trainer)


@pytest.mark.parametrize("lost", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("dies", [False, True])
def test_an_engine_that_does_not_take_an_update_is_replaced_by_one_that_has_it(
    lost: tuple[int, ...], dies: bool
) -> None:
    """One of two engines, or both, refuse the weights or die: the run goes on with the new weights."""
    fakes = Fakes(lambda index, number: {"refuses_weights": not dies and index in lost and not number})

    async def happens(_version: int) -> None:
        for index in lost if dies and len(trainer.sent) == 1 else ():
            fakes.made[index][0].die()

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        await sync(pool, 5)
        await until(lambda: all(serves(engine)() for engine in pool.engines))
        assert versions(fakes) == [5, 5]
        assert [len(fakes.made[index]) for index in (0, 1)] == [1 + (index in lost) for index in (0, 1)]

    trainer = FakeTrainer(happens)
    run(scenario, fakes, 2, trainer)


@pytest.mark.parametrize("others", [0, 1])
def test_the_second_identical_refusal_of_the_weights_ends_the_run(others: int) -> None:
    """With the engine's reason, wherever the run waits: at a request, or before its next training step."""
    fakes = Fakes(lambda index, _number: {"refuses_weights": index == 0})

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        await sync(pool, 1)
        await until(lambda: pool._fault is not None)
        said = "^engine 0 refuses the weights, also after a restart: engine 0 refuses the weights$"
        if not others:
            with pytest.raises(WeightsRefusedError, match=said):
                await pool.engines[0].generate(REQUEST)
        with pytest.raises(WeightsRefusedError, match=said):
            await sync(pool, 2)
        assert len(fakes.made[0]) == 2
        assert pool.restarts == 1

    run(scenario, fakes, 1 + others)


def test_refusals_with_other_reasons_or_a_success_between_them_cost_a_restart_each() -> None:
    fakes = Fakes(lambda _index, number: {"refuses_weights": number in (0, 2)})

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        await sync(pool, 1)
        await until(serves(pool.engines[0]))
        fakes.made[0][1].refuses_weights = True
        await sync(pool, 2)
        with pytest.raises(WeightsRefusedError):  # the third process refuses version 2 as the second did
            await pool.engines[0].generate(REQUEST)
        assert len(fakes.made[0]) == 3

    run(scenario, fakes)


def test_updates_that_time_out_are_no_refusals() -> None:
    """Restarts go on until `engine.max_restarts`: a slow or lost connection may come back."""

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        engine = pool.engines[0]
        for _ in range(3):
            pool._note_update(engine, TransportError("no answer within 1 s"))
            pool._note_update(engine, DeadEngineError("it died"))
        assert len(fakes.made[0]) == 1

    run(scenario)


def test_a_process_that_replaces_another_during_an_update_is_not_asked_to_commit() -> None:
    """It has begun nothing; it takes the weights by an update of its own."""

    async def happens(_version: int) -> None:
        if len(trainer.sent) == 1:
            fakes.made[0][0].die()
            await until(lambda: len(fakes.made[0]) == 2)

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        await sync(pool, 5)
        await until(lambda: len(pool.serving()) == 2)
        assert versions(fakes) == [5, 5]
        assert fakes.made[0][1].commits == 1

    fakes, trainer = Fakes(), FakeTrainer(happens)
    run(scenario, fakes, 2, trainer)
    assert trainer.sent == [5, 5]


def test_an_update_without_a_serving_engine_is_taken_after_the_restart() -> None:
    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        async with pool.training():
            fakes.made[0][0].die()
            await until(lambda: not pool.serving())
            await pool.sync_weights(5)
            assert not pool.serving()
        await until(serves(pool.engines[0]))
        assert versions(fakes) == [5]

    run(scenario)


@pytest.mark.parametrize("updates", [True, False])
def test_shared_memory_is_the_trainer_s_while_it_computes(updates: bool) -> None:
    """The trainer takes the memory after the engines have given it, and they take theirs after it has given
    its own: first their weights, which an update overwrites while the trainer keeps its weights, then the
    rest. An engine that keeps its memory is ended at once, and restarted after.
    """
    fakes = Fakes(lambda index, number: {"keeps_memory": index == 0 and not number})
    moves: list[tuple[str, set[str]]] = []

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        kept = fakes.made[1][0]
        async with pool.training():
            await until(lambda: fakes.made[0][-1].ended == 1 or len(fakes.made[0]) == 2)
            await let_others_run()
            assert kept.memory == set()
            assert pool.engines[0].state is not State.SERVING
            assert len(fakes.made[0]) == 1
            if updates:
                await pool.sync_weights(1)
                assert kept.memory == {"weights"}
        assert kept.memory == {"weights", "cache"}
        update = ["begin", "commit"] if updates else []
        first, last = ["hold", "offload", "reload weights"], ["reload cache", "release"]
        assert kept.moves == [*first, *update, *last]
        assert moves == [("reload", set()), ("offload", set()), ("offload all", {"weights"})]
        await until(serves(pool.engines[0]))
        assert fakes.made[0][1].memory == {"weights", "cache"}
        assert versions(fakes) == ([1, 1] if updates else [0, 0])

    trainer = FakeTrainer(moves=lambda name: moves.append((name, set(fakes.made[1][0].memory))))
    run(scenario, fakes, 2, trainer, shares_devices=True)


def test_memory_that_is_not_shared_is_left_alone() -> None:
    moves: list[str] = []

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        async with pool.training():
            await pool.sync_weights(1)
        assert fakes.made[0][0].moves == ["hold", "begin", "commit", "release"]
        assert not moves

    run(scenario, trainer=FakeTrainer(moves=moves.append))


def test_requests_wait_while_a_synchronous_trainer_computes_and_go_on_beside_an_asynchronous_one() -> None:
    async def synchronous(pool: FakePool, fakes: Fakes) -> None:
        async with pool.training():
            waiting = asyncio.ensure_future(pool.engines[0].generate(REQUEST))
            await asyncio.sleep(10)
            assert not waiting.done()
            await pool.sync_weights(1)
            await let_others_run()
            assert not waiting.done()
        assert (await waiting).version == 1
        assert fakes.made[0][0].health_checks == 0

    async def asynchronous(pool: FakePool, fakes: Fakes) -> None:
        async with pool.training():
            assert (await pool.engines[0].generate(REQUEST)).version == 0
            await pool.sync_weights(1)
            assert (await pool.engines[0].generate(REQUEST)).version == 1
        assert fakes.made[0][0].moves == ["begin", "commit"]

    run(synchronous, health_seconds=1)
    run(asynchronous, sampling_goes_on=True)


def test_an_engine_is_checked_beside_an_asynchronous_trainer_but_not_during_an_update() -> None:
    fakes = Fakes(lambda _, number: {"hangs_at": 1, "healthy": True} if not number else {})
    checks: list[int] = []

    async def happens(_version: int) -> None:
        checks.append(fakes.made[0][0].health_checks)
        await asyncio.sleep(5)
        checks.append(fakes.made[0][0].health_checks)

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        working = asyncio.ensure_future(pool.engines[0].generate(REQUEST))
        async with pool.training():
            await until(lambda: fakes.made[0][0].health_checks == 3)
            await pool.sync_weights(1)
            assert checks == [3, 3]
            fakes.made[0][0].healthy = False
            with pytest.raises(EngineError):
                await working
        await until(serves(pool.engines[0]))
        assert versions(fakes) == [1]

    run(scenario, fakes, trainer=FakeTrainer(happens), sampling_goes_on=True, health_seconds=1)


@pytest.mark.parametrize("shares_devices", [False, True])
def test_an_engine_that_dies_when_it_is_held_is_replaced(shares_devices: bool) -> None:
    fakes = Fakes(lambda index, number: {"dies_when_held": index == 0 and not number})

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        async with pool.training():
            assert [engine.state for engine in pool.serving()] == [State.SERVING]
            waiting = asyncio.ensure_future(pool.engines[0].generate(REQUEST))
            await pool.sync_weights(1)
        with pytest.raises(DeadEngineError):
            await waiting
        await until(lambda: len(pool.serving()) == 2)
        assert versions(fakes) == [1, 1]
        for engine in pool.engines:
            assert (await engine.generate(REQUEST)).version == 1

    run(scenario, fakes, 2, shares_devices=shares_devices)


def test_an_engine_that_never_finishes_a_hold_is_replaced() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        fakes.made[0][0].hold = never  # type: ignore[method-assign]
        async with pool.training():
            await pool.sync_weights(1)
        await until(serves(pool.engines[0]))
        assert "no answer" in pool.engines[0].reason
        assert versions(fakes) == [1]

    run(scenario, update_seconds=1, start_seconds=100)


def test_a_stall_is_logged_with_each_engine_s_status_and_oldest_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fakes = Fakes(lambda index, number: {"slow": True} if number else {"hangs_at": 1, "healthy": index == 0})
    messages: list[str] = []

    async def scenario(pool: FakePool, _: Fakes) -> None:
        driver = TreeDriver(pool.engines, sampling(initial_branching=2), decode, seed=7)
        prompts = [Prompt(f"train:{i}", prompt_tokens(i), "", "", "") for i in range(2)]
        async with watched(driver, pool.engines, 0.01), aclosing(driver.sample(prompts, 0)) as results:
            sampling_trees = asyncio.ensure_future(anext(results))
            await until(lambda: any(processes[0].requests for processes in fakes.made.values()))
            pool.engines[1].fail("its memory is full")
            while not any("memory" in text and "train:0" in text for text in caplog.messages):
                await asyncio.sleep(0.005)
            messages.extend(caplog.messages)
            sampling_trees.cancel()
            await asyncio.wait((sampling_trees,))

    run(scenario, fakes, 2)
    stall = next(text for text in messages if "nothing was answered for 0.01 s" in text)
    assert re.search(
        r"engine 0 is serving with \d unanswered requests, the oldest \d+ s old: request 0 of prompt train:0",
        stall,
    )
    lost = next(text for text in messages if "memory" in text and "train:0" in text)
    assert re.search(r"engine 1 is \w+: its memory is full with ", lost)


def test_the_status_of_an_engine_says_why_it_does_not_serve() -> None:
    fakes = Fakes(lambda _, number: {"slow": number == 1})

    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        (engine,) = pool.engines
        assert (engine.name, engine.status) == ("engine 0", "serving")
        engine.fail("its memory is full")
        assert engine.status == "down: its memory is full"
        await until(lambda: len(fakes.made[0]) == 2)
        assert engine.status == "starting: its memory is full"
        fakes.made[0][1].loaded.set()
        await until(serves(engine))
        assert engine.status == "serving"
        fakes.made[0][1].die()
        await until(lambda: engine.state is State.GIVEN_UP)
        assert engine.status == "given up: its process ended"

    run(scenario, fakes, max_restarts=1)


@pytest.mark.parametrize("late", [False, True])
def test_a_first_start_that_fails_ends_the_run(late: bool) -> None:
    async def scenario() -> None:
        fakes = Fakes(lambda _, __: {"start_error": None if late else "no such model"})
        config = EngineConfig.model_validate({"count": 2, "start_seconds": 0.01})
        pool = EnginePool(fakes, config)
        if late:
            fakes.made[1][0].loaded.clear()
        with pytest.raises(EngineError, match="has not started after 0.01 s" if late else "no such model"):
            await pool.ready()
        await pool.close()
        assert all(process.ended for processes in fakes.made.values() for process in processes)

    run_virtually(scenario())
