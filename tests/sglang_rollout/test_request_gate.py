"""The request gate: open, draining and closed."""

import asyncio

import pytest

from sglang_rollout.request_gate import RequestGate
from treepo.errors import EngineError


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_draining_gate_holds_requests_back_until_it_opens_or_closes() -> None:
    async def scenario() -> None:
        gate = RequestGate()
        log: list[str] = []

        async def request(name: str, end: asyncio.Event) -> None:
            async with gate.request():
                log.append(f"{name} in")
                await end.wait()

        end = asyncio.Event()
        first = asyncio.ensure_future(request("first", end))
        await settle()
        gate.drain()
        second = asyncio.ensure_future(request("second", end))
        drained = asyncio.ensure_future(gate.drained())
        await settle()
        assert log == ["first in"]
        assert not drained.done()
        end.set()
        await first
        await drained
        assert not second.done()
        gate.close("half a model")
        with pytest.raises(EngineError, match="half a model"):
            await second
        gate.open()
        await request("third", end)
        assert log == ["first in", "third in"]
        await gate.drained()

    asyncio.run(scenario())


def test_a_cancelled_request_does_not_keep_the_gate_from_draining() -> None:
    async def scenario() -> None:
        gate = RequestGate()

        async def request() -> None:
            async with gate.request():
                await asyncio.Event().wait()

        inside = asyncio.ensure_future(request())
        await settle()
        gate.drain()
        waiting = asyncio.ensure_future(request())
        await settle()
        for task in (inside, waiting):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.wait_for(gate.drained(), timeout=5)

    asyncio.run(scenario())
