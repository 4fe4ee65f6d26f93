"""The gate between requests and what needs an engine without them: weight syncs and holds.

Two independent reasons shut it: a weight sync drains it, and the pool holds it. Requests wait until both have
ended. A gate that is closed, because the engine has no whole weights, refuses them.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from treepo.errors import EngineError


class RequestGate:
    """Lets requests in while it is open, makes them wait while it is shut, and refuses them while it is
    closed.
    """

    def __init__(self) -> None:
        self._refusal: str | None = None
        self._held = self._draining = False
        self._passable = asyncio.Event()  # open or closed
        self._passable.set()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_held(self) -> bool:
        return self._held

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def is_shut(self) -> bool:
        """Whether new requests wait."""
        return not self._passable.is_set()

    @property
    def refusal(self) -> str | None:
        """Why the gate is closed; None while it is not."""
        return self._refusal

    def hold(self) -> None:
        """Make new requests wait until `release`; the ones inside go on."""
        self._held = True
        self._decide()

    def release(self) -> None:
        self._held = False
        self._decide()

    def drain(self) -> None:
        """Make new requests wait until `open` or `close`; the ones inside go on."""
        self._refusal, self._draining = None, True
        self._decide()

    def open(self) -> None:
        """End the draining. Requests still wait if the gate is held."""
        self._refusal, self._draining = None, False
        self._decide()

    def close(self, reason: str) -> None:
        """Refuse the requests that wait and all later ones, even while the gate is held."""
        self._refusal, self._draining = reason, False
        self._decide()

    async def drained(self) -> None:
        """Wait until no request is inside."""
        await self._empty.wait()

    async def settled(self) -> None:
        """Wait until the gate is not shut. It may be again when the caller runs."""
        await self._passable.wait()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be inside while the body runs. Not while the gate is shut; raises EngineError if it is closed."""
        assert not self.is_shut
        if self._refusal is not None:
            raise EngineError(f"the engine refuses to serve: {self._refusal}")
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def _decide(self) -> None:
        if self._refusal is not None or not (self._held or self._draining):
            self._passable.set()
        else:
            self._passable.clear()
