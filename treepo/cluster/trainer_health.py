"""Tells a trainer that hangs from one at work, by what its ranks say of themselves during a call.

A rank that waits for another in a collective answers, but finishes nothing; a rank whose process is stopped
does not even answer. Times are in seconds.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ray.exceptions import RayActorError, RayTaskError

from treepo.cluster.trainer_rank import Beat

_ASK_SECONDS = 5.0


@dataclass(slots=True)
class _Heard:
    """Of one rank: when it answered last, what it had finished at first and last, and when that grew."""

    answered: float
    first: int | None = None
    last: int = 0
    grew: float = 0.0

    @property
    def finished(self) -> int:
        return 0 if self.first is None else self.last - self.first


class Silence:
    """What the ranks of a trainer have finished during one call. The call begins at time 0.

    silence: the longest that a rank may take to answer. patience: the longest in which no rank needs to
    finish anything.
    """

    def __init__(self, ranks: int, silence: float, patience: float) -> None:
        self._silence, self._patience = silence, patience
        self._heard = [_Heard(0.0) for _ in range(ranks)]

    def answered(self, rank: int, finished: int, now: float) -> None:
        """A rank has answered. finished: pieces of work since the rank started."""
        heard = self._heard[rank]
        heard.answered = now
        if heard.first is None:
            heard.first = heard.last = finished
        elif finished > heard.last:
            heard.last, heard.grew = finished, now

    def hang(self, now: float) -> str | None:
        """Which ranks hang and since when; None if the trainer works."""
        silent = [rank for rank, heard in enumerate(self._heard) if now - heard.answered >= self._silence]
        if silent:
            seconds = now - max(self._heard[rank].answered for rank in silent)
            return f"{_named(silent)} (no answer for {seconds:.0f} s)"
        seconds = now - max(heard.grew for heard in self._heard)
        if seconds < self._patience:
            return None
        least = min(heard.finished for heard in self._heard)
        behind = [rank for rank, heard in enumerate(self._heard) if heard.finished == least]
        rest = "" if len(behind) == len(self._heard) else ", and the other ranks wait"
        return f"{_named(behind)} (nothing finished for {seconds:.0f} s{rest})"


def _named(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


async def hang_of(
    beats: Sequence[Callable[[], Awaitable[Beat]]],
    latest: list[Beat | None],
    silence: float,
    patience: float,
) -> str:
    """Ask every rank again and again while a call runs; return which ranks hang once any does.

    beats: asks each rank. latest: keeps each rank's last answer. Time in which this process did not run does
    not count.
    """
    heard, now = Silence(len(beats), silence, patience), 0.0
    interval = min(_ASK_SECONDS, silence / 4)
    asked: list[asyncio.Future[Beat] | None] = [None] * len(beats)
    loop = asyncio.get_running_loop()
    try:
        while True:
            began = loop.time()
            for rank, ask in enumerate(beats):
                asked[rank] = asked[rank] or asyncio.ensure_future(ask())
            await asyncio.wait([one for one in asked if one], timeout=interval)
            await asyncio.sleep(max(0.0, began + interval - loop.time()))
            now += min(loop.time() - began, 2 * interval)
            for rank, answer in enumerate(asked):
                if answer is not None and answer.done():
                    asked[rank] = None
                    _take(rank, answer, heard, latest, now)
            if (words := heard.hang(now)) is not None:
                return words
    finally:
        for answer in asked:
            if answer is not None:
                answer.cancel()


def _take(
    rank: int, answer: "asyncio.Future[Beat]", heard: Silence, latest: list[Beat | None], now: float
) -> None:
    try:
        beat = answer.result()
    except (RayActorError, RayTaskError):  # the call that runs fails with it too
        return
    latest[rank] = beat
    heard.answered(rank, beat.finished, now)
