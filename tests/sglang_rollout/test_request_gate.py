"""The request gate: open, held, draining and closed."""

import asyncio
from contextlib import suppress

import pytest

from sglang_rollout.request_gate import RequestGate
from treepo.errors import EngineError


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


class Visitors:
    """Requests that stay inside the gate until `leave`."""

    def __init__(self, gate: RequestGate) -> None:
        self.inside: list[str] = []
        self.leave = asyncio.Event()
        self._gate = gate

    def send(self, name: str) -> asyncio.Task[None]:
        return asyncio.create_task(self._visit(name))

    async def _visit(self, name: str) -> None:
        while self._gate.is_shut:
            await self._gate.settled()
        with self._gate.inside():
            self.inside.append(name)
            await self.leave.wait()


def test_a_draining_gate_holds_requests_back_until_it_opens_or_closes() -> None:
    async def scenario() -> None:
        gate = RequestGate()
        visitors = Visitors(gate)
        first = visitors.send("first")
        await settle()
        gate.drain()
        second = visitors.send("second")
        drained = asyncio.ensure_future(gate.drained())
        await settle()
        assert visitors.inside == ["first"]
        assert not drained.done()
        visitors.leave.set()
        await first
        await drained
        assert not second.done()
        gate.close("half a model")
        with pytest.raises(EngineError, match="half a model"):
            await second
        gate.open()
        await visitors.send("third")
        assert visitors.inside == ["first", "third"]
        await gate.drained()

    asyncio.run(scenario())


@pytest.mark.parametrize("order", ["hold drain open release", "drain hold release open"])
def test_a_gate_that_is_held_and_drained_lets_nothing_in_before_both_end(order: str) -> None:
    async def scenario() -> None:
        gate = RequestGate()
        visitors = Visitors(gate)
        begin, also, end, at_last = (getattr(gate, step) for step in order.split())
        begin()
        visitors.send("first")
        await settle()
        also()
        end()
        await settle()
        assert gate.is_shut
        assert visitors.inside == []
        at_last()
        await settle()
        assert visitors.inside == ["first"]

    asyncio.run(scenario())


def test_a_closed_gate_refuses_even_while_it_is_held() -> None:
    """A request must not wait for the end of a hold to learn that the engine cannot serve."""

    async def scenario() -> None:
        gate = RequestGate()
        visitors = Visitors(gate)
        gate.hold()
        waiting = visitors.send("first")
        await settle()
        gate.drain()
        gate.close("half a model")
        with pytest.raises(EngineError, match="half a model"):
            await waiting
        gate.drain()
        gate.open()
        assert gate.is_shut, "it is still held"

    asyncio.run(scenario())


def test_a_cancelled_request_does_not_keep_the_gate_from_draining() -> None:
    async def scenario() -> None:
        gate = RequestGate()
        visitors = Visitors(gate)
        inside = visitors.send("inside")
        await settle()
        gate.drain()
        waiting = visitors.send("waiting")
        await settle()
        for task in (inside, waiting):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert task.cancelled()
        await asyncio.wait_for(gate.drained(), timeout=5)

    asyncio.run(scenario())
