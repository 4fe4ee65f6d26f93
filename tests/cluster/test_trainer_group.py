"""The trainer's ranks as a group, with fakes in place of Ray: what is lost, what is ended, what is said."""

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from tests.cluster.test_session import config_of
from treepo.cluster import trainer_group
from treepo.cluster.trainer_group import TrainerGroup
from treepo.cluster.trainer_rank import Beat, RankProcess
from treepo.errors import ActorError, LostTrainerError, PlacementError, TrainerError, TrainerMemoryError
from treepo.planning.simulation.virtual_clock import run_virtually

ANSWERS: dict[str, Any] = {"open_store": ("host", 1), "beat": Beat(0, 3 << 30, 8 << 30, 1)}


class Ranks:
    """Fake actors, in place of Ray. does: what a call does on a rank, by method and number; else it answers
    at once. A call of an actor that was killed fails.
    """

    def __init__(self) -> None:
        self.does: dict[tuple[str, int], Callable[[], Any]] = {}
        self.made = 0
        self.killed: set[int] = set()
        self.ended: list[int] = []
        self.calls: list[str] = []

    def options(self, **_: object) -> Any:
        number, self.made = self.made, self.made + 1
        return SimpleNamespace(remote=lambda: Actor(self, number))

    def kill(self, actor: "Actor") -> None:
        self.killed.add(actor.number)

    async def end(self, processes: Sequence[RankProcess]) -> None:
        self.ended += [process.pid for process in processes]

    def wait(self, calls: Sequence[Any], **_: object) -> tuple[list[Any], list[Any]]:
        return [call for call in calls if call.done()], []


class Actor:
    def __init__(self, ranks: Ranks, number: int) -> None:
        self.ranks, self.number = ranks, number

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(
            remote=lambda *arguments: asyncio.ensure_future(self._answer(method, arguments))
        )

    async def _answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        told = str(arguments[0]) if method == "call" else method
        await asyncio.sleep(0)
        if self.number in self.ranks.killed:
            raise ActorDiedError
        if method == "process":
            return RankProcess("node", self.number, 0.0)
        if method != "beat":
            self.ranks.calls.append(f"{told} {self.number}")
        happens = self.ranks.does.get((told, self.number))
        result = happens() if happens else ANSWERS.get(told)
        return await result if asyncio.iscoroutine(result) else result


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks()
    fake = SimpleNamespace(remote=lambda **_: lambda _: ranks, kill=ranks.kill, wait=ranks.wait)

    async def reserve_again(options: Any, nodes: Any, _: float) -> Any:
        return options, nodes

    async def death_of(_: object) -> str:
        return "its process 7 ended"

    monkeypatch.setattr(trainer_group, "ray", fake)
    monkeypatch.setattr(trainer_group, "end_processes", ranks.end)
    monkeypatch.setattr(trainer_group, "reserve_again", reserve_again)
    monkeypatch.setattr(trainer_group, "death_of", death_of)
    return ranks


def run(scenario: Callable[[TrainerGroup], Any]) -> None:
    async def main() -> None:
        group = TrainerGroup(config_of(2), [{}, {}])
        await group.ready()
        await scenario(group)

    run_virtually(main())


def test_ranks_are_built_before_they_are_warmed_up(ranks: Ranks) -> None:
    async def scenario(_: TrainerGroup) -> None:
        assert ranks.calls[0] == "open_store 0"
        assert sorted(ranks.calls[1:3]) == ["build 0", "build 1"]
        assert sorted(ranks.calls[3:]) == ["warm_up 0", "warm_up 1"]

    run(scenario)


def dies() -> None:
    raise ActorDiedError


async def waits() -> None:
    """As in a collective whose other rank is gone."""
    await asyncio.sleep(10**6)


def test_if_a_rank_dies_the_others_are_ended_and_every_call_says_so(ranks: Ranks) -> None:
    ranks.does = {("offload", 1): dies, ("offload", 0): waits}

    async def scenario(group: TrainerGroup) -> None:
        with pytest.raises(LostTrainerError, match=r"^the trainer lost rank 1 \(its process 7 ended\)$"):
            await group.offload(weights=True)
        assert ranks.killed == {0, 1}
        assert ranks.ended == [0, 1]
        for _ in range(2):
            with pytest.raises(LostTrainerError, match="the trainer lost rank 1"):
                await group.reload()
        assert not any("reload" in call for call in ranks.calls)

    run(scenario)


def test_after_a_restart_other_ranks_answer(ranks: Ranks) -> None:
    ranks.does = {("offload", 0): dies}

    async def scenario(group: TrainerGroup) -> None:
        with pytest.raises(LostTrainerError):
            await group.offload(weights=True)
        await group.restart()
        assert ranks.made == 4
        assert sorted(ranks.calls[-4:]) == ["build 2", "build 3", "warm_up 2", "warm_up 3"]
        await group.offload(weights=True)
        assert sorted(ranks.calls[-2:]) == ["offload 2", "offload 3"]

    run(scenario)


def test_a_restart_that_finds_no_room_ends_the_run(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_room(*_: object) -> Any:
        raise PlacementError("there is no room")

    async def scenario(group: TrainerGroup) -> None:
        monkeypatch.setattr(trainer_group, "reserve_again", no_room)
        with pytest.raises(TrainerError, match="cannot start again: there is no room") as failure:
            await group.restart()
        assert not isinstance(failure.value, LostTrainerError)

    assert not ranks.made
    run(scenario)


def test_a_hang_is_a_loss(ranks: Ranks) -> None:
    ranks.does = {("train_batch", 0): waits, ("train_batch", 1): waits}

    async def scenario(group: TrainerGroup) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        text = r"hangs in reload: rank 0, rank 1 \(nothing finished for 60\d s\)"
        ranks.does = {("reload", 0): waits, ("reload", 1): waits}
        with pytest.raises(LostTrainerError, match=text):
            await group.reload()
        assert 600 <= loop.time() - began <= 620
        assert ranks.killed == {0, 1}

    run(scenario)


@pytest.mark.parametrize("method", ["finish_save", "warm_up"])
def test_work_on_folders_may_be_silent_for_longer(ranks: Ranks, method: Any) -> None:
    async def scenario(group: TrainerGroup) -> None:
        ranks.does = {(method, rank): lambda: asyncio.sleep(1700) for rank in (0, 1)}
        await group._call(method)
        ranks.does = {(method, rank): waits for rank in (0, 1)}
        with pytest.raises(LostTrainerError, match="hangs in"):
            await group._call(method)

    run(scenario)


def raises(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise RayTaskError("call", "ray::call (pid=7, ip=10.0.0.1)", error).as_instanceof_cause()

    return call


def test_a_broken_collective_is_a_loss_and_other_errors_are_not(ranks: Ranks) -> None:
    async def scenario(group: TrainerGroup) -> None:
        ranks.does = {("reload", 0): raises(TrainerMemoryError("rank 0 ran out of memory"))}
        with pytest.raises(TrainerMemoryError, match="rank 0 ran out of memory"):
            await group.reload()
        ranks.does = {("reload", 0): raises(FloatingPointError("nan"))}
        with pytest.raises(ActorError, match=r"FloatingPointError: nan \(process 7 on 10\.0\.0\.1; "):
            await group.reload()
        await group.offload(weights=True)
        ranks.does = {("reload", 0): raises(LostTrainerError("rank 0 (reload: Connection closed by peer)"))}
        with pytest.raises(LostTrainerError, match=r"^the trainer lost rank 0 \(reload: Connection closed"):
            await group.reload()
        assert ranks.killed == {0, 1}

    run(scenario)


def test_a_kill_for_memory_is_not_repeated(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's kernel had killed one process before, and has killed two now."""

    async def death_of(_: object) -> str:
        return "it ended; since its start the kernel of that machine has killed 2 processes for memory"

    async def slow() -> None:
        await asyncio.sleep(30)
        raise ActorDiedError

    async def scenario(group: TrainerGroup) -> None:
        monkeypatch.setattr(trainer_group, "death_of", death_of)
        ranks.does = {("reload", 1): slow}
        with pytest.raises(TrainerMemoryError) as failure:
            await group.reload()
        text = str(failure.value)
        assert "it held 3.0 of its machine's 8.0 GiB" in text
        for key in ("reward.workers", "trainer.offload", "checkpoint.every"):
            assert key in text
        assert "\n" not in text

    run(scenario)
