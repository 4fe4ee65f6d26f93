"""The gate between requests and weight syncs: open, draining, or closed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from treepo.errors import EngineError


class RequestGate:
    """Lets requests in while it is open, makes them wait while it is draining, refuses them while it is
    closed.
    """

    def __init__(self) -> None:
        self._refusal: str | None = None
        self._decided = asyncio.Event()  # open or closed
        self._decided.set()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_draining(self) -> bool:
        return not self._decided.is_set()

    @property
    def refusal(self) -> str | None:
        """Why the gate is closed; None while it is open."""
        return self._refusal

    def open(self) -> None:
        self._refusal = None
        self._decided.set()

    def drain(self) -> None:
        """Hold new requests back; the ones inside go on."""
        self._decided.clear()

    def close(self, reason: str) -> None:
        """Refuse the requests that wait and all later ones."""
        self._refusal = reason
        self._decided.set()

    async def drained(self) -> None:
        """Wait until no request is inside."""
        await self._empty.wait()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Be inside while the body runs. Raises EngineError if the gate is closed."""
        while self.is_draining:
            await self._decided.wait()
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
