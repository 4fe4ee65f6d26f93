"""A trainer that hangs is told from one at work by what its ranks say."""

import asyncio
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError

from treepo.cluster.trainer_health import Silence, hang_of
from treepo.cluster.trainer_rank import Beat
from treepo.planning.simulation.virtual_clock import run_virtually


def test_ranks_that_finish_nothing_hang() -> None:
    silence = Silence(3, silence=60, patience=60)
    for second in range(0, 90, 10):
        for rank, last in enumerate((30, 20, 30)):
            silence.answered(rank, 100 * rank + min(second, last), second)
        assert silence.hang(second) is None, "the last progress was at 30"
    for rank, finished in enumerate((30, 120, 230)):
        silence.answered(rank, finished, 90)
    assert silence.hang(90) == "rank 1 (nothing finished for 60 s, and the other ranks wait)"


def test_one_rank_at_work_is_enough() -> None:
    silence = Silence(2, silence=60, patience=60)
    for second in range(0, 1000, 10):
        silence.answered(0, 5, second)
        silence.answered(1, second // 50, second)
        assert silence.hang(second) is None


def test_ranks_that_are_equally_far_are_all_named() -> None:
    silence = Silence(2, silence=60, patience=120)
    for second in (0, 50, 100, 119):
        for rank in range(2):
            silence.answered(rank, 5, second)
        assert silence.hang(second) is None
    for rank in range(2):
        silence.answered(rank, 5, 130)
    assert silence.hang(130) == "rank 0, rank 1 (nothing finished for 130 s)"


def test_a_rank_that_does_not_answer_hangs_whatever_the_patience() -> None:
    silence = Silence(2, silence=60, patience=1800)
    for second in range(0, 80, 10):
        silence.answered(0, second, second)
        if second <= 10:
            silence.answered(1, second, second)
    assert silence.hang(69) is None
    assert silence.hang(70) == "rank 1 (no answer for 60 s)"


def beats(finished: Callable[[float], float], answers: Callable[[float], bool]) -> Callable[[], object]:
    async def ask() -> Beat:
        loop = asyncio.get_running_loop()
        while not answers(loop.time()):
            await asyncio.sleep(1)
        return Beat(int(finished(loop.time())), 7, 8, 0)

    return ask


@pytest.mark.parametrize("silence", [4.0, 600.0])
def test_a_hang_is_found_soon_after_the_deadline(silence: float) -> None:
    async def scenario() -> None:
        latest: list[Beat | None] = [None, None]
        loop = asyncio.get_running_loop()
        began = loop.time()
        asks = [
            beats(lambda now: min(now - began, 1000.0), lambda _: True),
            beats(lambda now: min(now - began, 900.0), lambda _: True),
        ]
        words = await hang_of(asks, latest, silence, silence)  # type: ignore[arg-type]  # coroutine functions
        assert words.startswith("rank 1 (nothing finished for")
        assert 1000 + silence <= loop.time() - began <= 1000 + silence + 11
        assert latest[0] is not None
        assert latest[0].resident == 7

    run_virtually(scenario())


def test_a_stopped_rank_is_found_and_a_dead_one_left_to_its_call() -> None:
    async def dies() -> Beat:
        raise ActorDiedError

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        works = beats(lambda now: now, lambda _: True)
        stops = beats(lambda now: now, lambda now: now - began < 50)
        assert (await hang_of([works, stops], [None] * 2, 60, 60)).startswith("rank 1 (no answer for 60 s")  # type: ignore[arg-type]
        assert 105 <= loop.time() - began <= 125
        task = asyncio.create_task(hang_of([works, dies], [None] * 2, 600, 600))  # type: ignore[arg-type]
        await asyncio.sleep(300)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(scenario())
