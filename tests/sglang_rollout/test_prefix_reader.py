"""Requests that arrive together wait for what they share, and it is computed once."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from sglang_rollout.prefix_reader import SHORTEST, PrefixReader
from treepo.errors import EngineError

TRUNK = np.arange(10 * SHORTEST, dtype=np.int32)


def path(length: int, *more: int) -> np.ndarray:
    return np.append(TRUNK[:length], more).astype(np.int32)


class Computing:
    """Records the prefixes that are computed; each is computed once `go` is set. outcome: of all of them."""

    def __init__(self, outcome: int | None = 7) -> None:
        self.prefixes: list[int] = []
        self.go = asyncio.Event()
        self.outcome = outcome
        self.reader = PrefixReader(self._compute)

    async def _compute(self, prefix: np.ndarray) -> int | None:
        np.testing.assert_array_equal(prefix, TRUNK[: len(prefix)])
        self.prefixes.append(len(prefix))
        await self.go.wait()
        if self.outcome == 0:
            raise EngineError("it fails")
        return self.outcome

    def read(self, *contexts: np.ndarray) -> list[asyncio.Task[int]]:
        return [asyncio.create_task(self.reader.read(context)) for context in contexts]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_a_request_goes_on_when_what_it_shares_is_computed_and_one_of_them_pays() -> None:
    async def scenario() -> None:
        computing = Computing()
        one, other, alone = computing.read(path(64, 1000, 1), path(64, 1001, 2), np.array([9], np.int32))
        await settle()
        assert computing.prefixes == [64]
        assert alone.done()
        assert not one.done()
        assert not other.done()
        computing.go.set()
        assert sorted([await one, await other]) == [0, 7]
        assert await alone == 0

    run(scenario())


def test_what_is_known_is_not_computed_again_until_it_is_forgotten() -> None:
    async def scenario() -> None:
        computing = Computing()
        computing.go.set()
        pair = path(64, 1000, 1), path(64, 1001, 2)
        await asyncio.gather(*computing.read(*pair))
        assert await asyncio.gather(*computing.read(*pair)) == [0, 0]
        computing.reader.note(path(96, 5))
        children = path(96, 5), path(96, 5)
        assert await asyncio.gather(*computing.read(*children)) == [0, 0]
        assert computing.prefixes == [64]
        computing.reader.forget()
        await asyncio.gather(*computing.read(*children))
        assert computing.prefixes == [64, 96]

    run(scenario())


def test_requests_of_different_turns_and_short_prefixes_need_nothing() -> None:
    async def scenario() -> None:
        computing = Computing()
        for context in (path(64, 1, 2), path(64, 1, 3)):
            assert await computing.reader.read(context) == 0
        short = path(SHORTEST - 1, 1, 2), path(SHORTEST - 1, 2, 2)
        assert await asyncio.gather(*computing.read(*short)) == [0, 0]
        assert computing.prefixes == []

    run(scenario())


def test_an_interrupted_prefix_lets_the_requests_go_and_is_not_known() -> None:
    async def scenario() -> None:
        computing = Computing(None)
        computing.go.set()
        pair = path(64, 1000, 1), path(64, 1001, 2)
        for _ in range(2):
            assert await asyncio.gather(*computing.read(*pair)) == [0, 0]
        assert computing.prefixes == [64, 64]

    run(scenario())


def test_a_failure_is_the_error_of_every_request_below_and_a_cancelled_one_disturbs_none() -> None:
    async def scenario() -> None:
        computing = Computing(0)
        deep = path(128, 1000, 1), path(128, 1001, 2)
        requests = computing.read(path(64, 1000, 1), path(64, 1001, 2), *deep)
        await settle()
        requests[0].cancel()
        await settle()
        computing.go.set()
        for request in requests[1:]:
            with pytest.raises(EngineError, match="it fails"):
                await request

    run(scenario())
