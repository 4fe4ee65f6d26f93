"""The shares of idle time, compared with each engine's own seconds."""

import asyncio
import random

import pytest

from treepo.rollout.idle_clock import IdleClock


@pytest.mark.parametrize("seed", range(20))
def test_idle_shares_are_the_means_of_the_engines(seed: int) -> None:
    rng = random.Random(seed)
    engines, now = rng.randint(1, 4), 100.0

    async def play() -> None:
        nonlocal now
        asyncio.get_running_loop().time = lambda: now
        clock, requests, paused = IdleClock(engines), [0] * engines, False
        clock.take()
        busy, running, whole = [0.0] * engines, 0.0, 0.0
        for _ in range(100):
            seconds = rng.choice([0.0, 0.5, 2.0])
            now += seconds
            whole += seconds
            running += seconds * (not paused)
            for engine in range(engines):
                busy[engine] += seconds * (requests[engine] > 0 and not paused)
            engine = rng.randrange(engines)
            event = rng.choice(["begin", "end", "pause", "take"])
            if event == "begin":
                clock.begin(engine)
                requests[engine] += 1
            elif event == "end" and requests[engine]:
                clock.end(engine)
                requests[engine] -= 1
            elif event == "pause":
                clock.go_on() if paused else clock.pause()
                paused = not paused
                assert clock.paused == paused
            elif event == "take":
                idle = 1 - sum(busy) / engines / whole if whole else 0.0
                assert clock.take() == pytest.approx((idle, running))  # sums of halves in another order
                busy, running, whole = [0.0] * engines, 0.0, 0.0

    asyncio.run(play())
