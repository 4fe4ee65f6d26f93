"""Engines that die, hang and fail to start: what is lost (nothing), who serves then, and when it is over."""

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from tests.support.fake_process import FakeProcess
from tests.support.sampling_policies import sampling
from treepo.cluster.engine_pool import Fleet
from treepo.cluster.supervised_engine import State, SupervisedEngine
from treepo.config.engine import EngineConfig
from treepo.data.prompts import Prompt
from treepo.errors import DeadEngineError, EngineError, NoEngineError
from treepo.protocols import GenerateRequest
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.watchdog import watched
from treepo.tree import Tree, to_json
from treepo.weight_sync.send import Outcome
from treepo.weight_sync.transaction import sync_weights, update_weights

type FakeFleet = Fleet[FakeProcess]
REQUEST = GenerateRequest(np.array([5, 6], np.int32), 2, 4, 1.0, 0)


class Fakes:
    """Launches fake processes and keeps them all: `made[i]` are those of engine i, the oldest first.

    each: the settings of the n-th process of engine i.
    """

    def __init__(self, each: Callable[[int, int], dict[str, Any]] = lambda _index, _number: {}) -> None:
        self.made: dict[int, list[FakeProcess]] = {}
        self._each = each

    def __call__(self, index: int) -> FakeProcess:
        processes = self.made.setdefault(index, [])
        engine = FakeEngine(end=0.04, box=0.02, shuffle=index)
        process = FakeProcess(f"engine {index}", engine, **self._each(index, len(processes)))
        processes.append(process)
        return process


def run(
    scenario: Callable[[FakeFleet, Fakes], Any],
    fakes: Fakes | None = None,
    count: int = 1,
    shares_device: bool = False,
    **settings: Any,
) -> None:
    """The scenario on a fleet that is ready; every process that was made is ended afterwards."""

    async def main() -> None:
        launch = fakes or Fakes()
        fleet = Fleet(launch, EngineConfig.model_validate({"count": count} | settings), shares_device)
        try:
            await fleet.ready()
            async with asyncio.timeout(20):
                await scenario(fleet, launch)
        finally:
            await fleet.close()
        assert all(process.ended for processes in launch.made.values() for process in processes)

    asyncio.run(main())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0)


def serves(engine: SupervisedEngine[FakeProcess]) -> Callable[[], bool]:
    return lambda: engine.state is State.SERVING


async def trees(fleet: FakeFleet, count: int) -> list[str]:
    """Sampled by the fleet, as lines; none may have failed."""
    prompts = [Prompt(f"train:{i}", prompt_tokens(i), "", "", "") for i in range(count)]
    driver = TreeDriver(fleet.engines, sampling(retry_seconds=0.0, attempts=12), decode, seed=7)
    async with aclosing(driver.sample(prompts, step=0)) as results:
        finished: list[Tree | FailedTree] = [result async for result in results]
    assert not [result for result in finished if isinstance(result, FailedTree)]
    return sorted(to_json(tree).decode() for tree in finished if isinstance(tree, Tree))


def undisturbed(count: int) -> list[str]:
    found: list[str] = []

    async def scenario(fleet: FakeFleet, _: Fakes) -> None:
        found.extend(await trees(fleet, count))

    run(scenario)
    return found


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_deaths_lose_no_tree_and_change_none(engines: int) -> None:
    """Every process but the third of each engine dies after a while: trees are those of an engine that lives,
    token for token, because nothing that was finished is sampled again under anything else.
    """
    fakes = Fakes(lambda index, number: {"dies_at": 7 + 11 * index + 5 * number if number < 2 else None})

    async def scenario(fleet: FakeFleet, _: Fakes) -> None:
        assert await trees(fleet, 12) == undisturbed_trees

    undisturbed_trees = undisturbed(12)
    run(scenario, fakes, engines, max_restarts=2 * engines)
    assert all(len(processes) > 1 for processes in fakes.made.values())


def test_a_request_waits_for_the_successor_only_where_no_other_engine_serves() -> None:
    fakes = Fakes(
        lambda index, number: {"hangs_at": 1} if number == 0 and index == 0 else {"slow": number > 0}
    )

    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        first, second = fleet.engines
        lost = asyncio.ensure_future(first.generate(REQUEST))
        await until(lambda: first._outstanding == 1)
        first.fail("it was lost")
        with pytest.raises(DeadEngineError, match="it was lost"):
            await lost
        with pytest.raises(DeadEngineError, match=r"engine 0 is .*: it was lost"):
            await first.generate(REQUEST)
        second.fail("so was this one")
        one, other = (asyncio.ensure_future(engine.generate(REQUEST)) for engine in fleet.engines)
        await until(lambda: all(len(fakes.made[index]) == 2 for index in (0, 1)))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not one.done()
        assert not other.done()
        fakes.made[1][1].loaded.set()
        assert len((await other).tokens)
        with pytest.raises(DeadEngineError, match="engine 0 is starting: it was lost"):
            await one

    run(scenario, fakes, count=2)


def test_a_restarted_engine_serves_only_after_it_has_the_weights_and_nobody_changes_them_meanwhile() -> None:
    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        version = 3
        given: list[int] = []

        async def restore(process: FakeProcess) -> None:
            assert fleet.weights.locked()
            assert engine.state is State.STARTING
            process.engine.version = version
            given.append(version)

        fleet.restore = restore
        (engine,) = fleet.engines
        async with fleet.weights:
            fakes.made[0][0].die()
            await until(lambda: len(fakes.made[0]) == 2)
            waiting = asyncio.ensure_future(engine.generate(REQUEST))
            for _ in range(50):
                await asyncio.sleep(0)
            assert not given
            version = 4
        assert (await waiting).version == 4
        assert given == [4]

    run(scenario)


def test_silence_is_death_but_work_is_not() -> None:
    """Both engines answer no request; one shows life when asked, and is left alone."""
    fakes = Fakes(lambda index, number: {"hangs_at": 1, "lively": index == 1} if not number else {})

    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        silent, busy = fleet.engines
        working = asyncio.ensure_future(busy.generate(REQUEST))
        with pytest.raises(DeadEngineError, match="no sign of life"):
            await silent.generate(REQUEST)
        await until(serves(silent))
        await until(lambda: fakes.made[1][0].probes > 3)
        assert busy.state is State.SERVING
        assert not working.done()
        working.cancel()

    run(scenario, fakes, 2, health_seconds=0.01)
    assert [len(fakes.made[index]) for index in (0, 1)] == [2, 1]


def test_nobody_who_has_no_request_is_asked_for_a_sign_of_life() -> None:
    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        await fleet.engines[0].generate(REQUEST)
        await asyncio.sleep(0.05)
        assert not fakes.made[0][0].probes

    run(scenario, health_seconds=0.001)


def test_restarts_are_bounded_over_the_run_and_the_rest_goes_on() -> None:
    fakes = Fakes(lambda index, number: {"start_error": "no memory"} if index == 0 and number else {})

    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        first, second = fleet.engines
        fakes.made[0][0].die()
        await until(lambda: first.state is State.GIVEN_UP)
        assert len(fakes.made[0]) == 4
        assert first.reason == "no memory"
        assert len(await trees(fleet, 4)) == 4
        fakes.made[1][0].die()
        await until(lambda: second.state is State.GIVEN_UP)
        with pytest.raises(NoEngineError, match=r"no engine is left: engine 0 .*no memory; engine 1 .*ended"):
            await second.generate(REQUEST)
        with pytest.raises(ExceptionGroup) as raised:
            await trees(fleet, 4)
        assert raised.group_contains(NoEngineError)

    run(scenario, fakes, 2, max_restarts=3)


def test_weights_that_cannot_be_restored_cost_a_restart_and_another_fault_ends_what_waits() -> None:
    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        errors: list[Exception] = [EngineError("refused"), ValueError("a fault of ours")]

        async def restore(_: FakeProcess) -> None:
            raise errors.pop(0)

        fleet.restore = restore
        fakes.made[0][0].die()
        await until(lambda: fleet.engines[0].state is not State.SERVING)
        with pytest.raises(ValueError, match="a fault of ours"):
            await fleet.engines[0].generate(REQUEST)
        assert len(fakes.made[0]) == 3

    run(scenario)


class FakeTrainer:
    """Sends nothing, in good order; somebody may die meanwhile."""

    def __init__(self, happens: Callable[[], None] = lambda: None) -> None:
        self._happens = happens

    async def manifest(self) -> tuple[()]:
        return ()

    async def send_weights(self, version: int, sinks: Sequence[Any]) -> Outcome:
        del version, sinks
        self._happens()
        return Outcome()


@pytest.mark.parametrize("lost", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("dies", [False, True])
def test_who_does_not_take_an_update_is_replaced_by_one_that_has_it(
    lost: tuple[int, ...], dies: bool
) -> None:
    """By refusing it or by dying in it, one of two engines or both: the run goes on with the new weights."""
    fakes = Fakes(lambda index, number: {"refuses": not dies and index in lost and not number})

    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        async def restore(process: FakeProcess) -> None:
            await update_weights(FakeTrainer(), [process], 5, 10)

        def happens() -> None:
            for index in lost if dies else ():
                fakes.made[index][0].die()

        fleet.restore = restore
        async with fleet.weights:
            await sync_weights(FakeTrainer(happens), fleet, 5, 10)
        await until(lambda: all(serves(engine)() for engine in fleet.engines))
        assert await fleet.call("version") == [5, 5]
        assert [len(fakes.made[index]) for index in (0, 1)] == [1 + (index in lost) for index in (0, 1)]

    run(scenario, fakes, 2)


def test_an_update_that_nobody_is_there_for_is_the_successor_s() -> None:
    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        async with fleet.weights:
            fakes.made[0][0].die()
            await until(lambda: not fleet.serving())
            await sync_weights(FakeTrainer(), fleet, 5, 10)
            assert not fleet.serving()

    run(scenario)


def test_shared_memory_is_the_trainer_s_while_it_computes() -> None:
    """An engine that does not let go of it is ended at once, and its successor starts only afterwards."""
    fakes = Fakes(lambda index, number: {"clings": index == 0 and not number})

    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        async with fleet.resting():
            await until(lambda: fakes.made[0][-1].ended == 1 or len(fakes.made[0]) == 2)
            for _ in range(50):
                await asyncio.sleep(0)
            assert not fakes.made[1][0].memory
            assert fleet.engines[0].state is not State.SERVING
            await fleet.restore_memory("weights")
            assert fakes.made[1][0].memory == {"weights"}
            assert len(fakes.made[0]) == 1
        assert fakes.made[1][0].memory == {"weights", "cache"}
        await until(serves(fleet.engines[0]))
        assert fakes.made[0][1].memory == {"weights", "cache"}

    run(scenario, fakes, 2, shares_device=True)


def test_memory_that_is_not_shared_is_left_alone() -> None:
    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        async with fleet.resting():
            assert fleet.weights.locked()
            await fleet.restore_memory("weights")
            assert fakes.made[0][0].memory == {"weights", "cache"}

    run(scenario)


def test_a_stall_says_who_owes_what(caplog: pytest.LogCaptureFixture) -> None:
    fakes = Fakes(lambda index, number: {"slow": True} if number else {"hangs_at": 1, "lively": index == 0})
    messages: list[str] = []

    async def scenario(fleet: FakeFleet, _: Fakes) -> None:
        driver = TreeDriver(fleet.engines, sampling(initial_branching=2), decode, seed=7)
        prompts = [Prompt(f"train:{i}", prompt_tokens(i), "", "", "") for i in range(2)]
        async with watched(driver, fleet.engines, 0.01), aclosing(driver.sample(prompts, 0)) as results:
            sampling_trees = asyncio.ensure_future(anext(results))
            await until(lambda: any(engine._outstanding for engine in fleet.engines))
            fleet.engines[1].fail("its memory is full")
            while not any("memory" in text and "train:0" in text for text in caplog.messages):
                await asyncio.sleep(0.005)
            messages.extend(caplog.messages)
            sampling_trees.cancel()
            await asyncio.wait((sampling_trees,))

    run(scenario, fakes, 2)
    stall = next(text for text in messages if "nothing was answered for 0.01 s" in text)
    assert re.search(
        r"engine 0 is serving and owes \d answers, the oldest to request 0 of prompt train:0", stall
    )
    lost = next(text for text in messages if "memory" in text and "train:0" in text)
    assert re.search(r"engine 1 is \w+ \(it was lost: its memory is full\) and owes ", lost)


def test_a_call_goes_to_those_who_serve() -> None:
    async def scenario(fleet: FakeFleet, fakes: Fakes) -> None:
        fakes.made[0][0].engine.version = 1
        assert await fleet.call("version") == [1, 0]
        fleet.engines[0].fail("lost")
        assert await fleet.call("version") == [0]

    run(scenario, count=2)


@pytest.mark.parametrize("late", [False, True])
def test_a_first_start_that_fails_ends_the_run(late: bool) -> None:
    async def scenario() -> None:
        fakes = Fakes(lambda _, __: {"start_error": None if late else "no such model"})
        config = EngineConfig.model_validate({"count": 2, "start_seconds": 0.01})
        fleet = Fleet(fakes, config)
        if late:
            fakes.made[1][0].loaded.clear()
        with pytest.raises(EngineError, match="has not started after 0.01 s" if late else "no such model"):
            await fleet.ready()
        await fleet.close()
        assert all(process.ended for processes in fakes.made.values() for process in processes)

    asyncio.run(scenario())
