"""The engine pool when the trainer is lost: engines stay up, with their memory, and serve the new weights."""

import asyncio
from typing import Any

import pytest

from tests.cluster.test_engine_pool import (
    REQUEST,
    FakePool,
    Fakes,
    FakeTrainer,
    let_others_run,
    run,
    sync,
    until,
    versions,
)
from treepo.cluster.pooled_engine import State
from treepo.errors import LostTrainerError

MOMENTS = ("body", "send 1", "send 2")
SHARED_MOMENTS = (*MOMENTS, "reload", "offload", "offload all")  # the trainer's memory moves too
WHOLE = {"weights", "cache"}


class LosableTrainer(FakeTrainer):
    """A trainer that is lost at one call, once; from then on every call fails until it is restarted.

    at: a move of its memory, or the number of the sending. engines: whose memory must be offloaded while the
    trainer restarts, if it shares their devices.
    """

    def __init__(self, at: str = "", engines: Fakes | None = None) -> None:
        super().__init__(self._sends, self._move)
        self.at, self.lost, self.engines = at, False, engines
        self.restarts = 0

    def check(self, name: str) -> None:
        if name == self.at:
            self.at, self.lost = "", True
        if self.lost:
            raise LostTrainerError("the trainer lost rank 0")

    def _move(self, name: str) -> None:
        if name == "restart":
            self.lost = False
            self.restarts += 1
            for processes in self.engines.made.values() if self.engines else ():
                assert not processes[-1].memory
        else:
            self.check(name)

    async def _sends(self, _version: int) -> None:
        self.check(f"send {len(self.sent)}")


@pytest.mark.parametrize(
    ("shares_devices", "moment"),
    [*((False, moment) for moment in MOMENTS), *((True, moment) for moment in SHARED_MOMENTS)],
)
def test_engines_serve_older_weights_after_a_loss_at_any_moment(moment: str, shares_devices: bool) -> None:
    fakes = Fakes()
    trainer = LosableTrainer(moment if moment != "body" else "", fakes if shares_devices else None)

    async def two_steps(pool: FakePool) -> None:
        await sync(pool, 1)
        async with pool.training():
            if moment == "body":
                trainer.lost = True
                raise LostTrainerError("the trainer lost rank 0")
            await pool.sync_weights(2)

    async def scenario(pool: FakePool, _: Fakes) -> None:
        with pytest.raises(LostTrainerError):
            await two_steps(pool)
        async with pool.restarted_trainer():
            await pool.sync_weights(0)
        assert trainer.restarts == 1
        assert versions(fakes) == [0, 0]
        outputs = await asyncio.gather(*(engine.generate(REQUEST) for engine in pool.engines))
        assert [output.version for output in outputs] == [0, 0]
        await sync(pool, 1)
        assert versions(fakes) == [1, 1]
        for processes in fakes.made.values():
            (process,) = processes
            assert process.memory == WHOLE
        assert pool.restarts == 0

    run(scenario, fakes, 2, trainer, shares_devices=shares_devices)


@pytest.mark.parametrize("shares_devices", [False, True])
def test_a_trainer_that_is_lost_again_while_it_restarts(shares_devices: bool) -> None:
    fakes, trainer = Fakes(), LosableTrainer()

    async def recover(pool: FakePool, lost_at: str) -> None:
        async with pool.restarted_trainer():
            trainer.at = lost_at
            trainer.check("load")
            await pool.sync_weights(1)

    async def scenario(pool: FakePool, _: Fakes) -> None:
        await sync(pool, 1)
        trainer.lost = True
        for lost_at in ("load", "send 2", "load", "send 3"):
            with pytest.raises(LostTrainerError):
                await recover(pool, lost_at)
        await recover(pool, "")
        await sync(pool, 2)
        assert versions(fakes) == [2]
        assert fakes.made[0][-1].memory == WHOLE
        assert len(fakes.made[0]) == 1

    run(scenario, fakes, 1, trainer, shares_devices=shares_devices)


@pytest.mark.parametrize("shares_devices", [False, True])
def test_an_engine_that_restarts_meanwhile_waits_for_the_next_trainer(shares_devices: bool) -> None:
    """It dies after a sync, and the trainer is found lost when the engine needs its weights."""
    fakes, trainer = Fakes(), LosableTrainer()

    async def scenario(pool: FakePool, _: Fakes) -> None:
        await sync(pool, 3)
        trainer.lost = True
        fakes.made[0][0].die()
        await until(lambda: pool.engines[0].state is not State.SERVING)
        with pytest.raises(LostTrainerError):
            await pool.engines[0].generate(REQUEST)
        with pytest.raises(LostTrainerError):
            async with pool.training():
                pass
        async with pool.restarted_trainer():
            await pool.sync_weights(2)
        await until(lambda: pool.engines[0].state is State.SERVING)
        assert versions(fakes) == [2]
        assert pool.restarts == 1
        assert (await pool.engines[0].generate(REQUEST)).version == 2
        await sync(pool, 3)
        assert versions(fakes) == [3]

    run(scenario, fakes, 1, trainer, shares_devices=shares_devices)


def test_engines_of_an_asynchronous_run_sample_until_they_get_the_weights() -> None:
    async def scenario(pool: FakePool, fakes: Fakes) -> None:
        await sync(pool, 1)
        answers: list[Any] = []
        async with pool.restarted_trainer():
            answers.append(await pool.engines[0].generate(REQUEST))
            await pool.sync_weights(0)
            await let_others_run()
        answers.append(await pool.engines[0].generate(REQUEST))
        assert [answer.version for answer in answers] == [1, 0]
        assert fakes.made[0][0].moves == ["begin", "commit"] * 2

    run(scenario, trainer=LosableTrainer(), sampling_goes_on=True)
