"""The gate between requests and weight updates."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from treepo.errors import EngineError


class Gate:
    """Requests pass it while it is open, wait while it is shut, and fail while it refuses."""

    def __init__(self) -> None:
        self._refusal: str | None = None
        self._decided = asyncio.Event()  # open or refusing
        self._decided.set()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_shut(self) -> bool:
        return not self._decided.is_set()

    def open(self) -> None:
        self._refusal = None
        self._decided.set()

    def shut(self) -> None:
        self._decided.clear()

    def refuse(self, reason: str) -> None:
        self._refusal = reason
        self._decided.set()

    async def empty(self) -> None:
        """Until no request is inside."""
        await self._empty.wait()

    @asynccontextmanager
    async def passage(self) -> AsyncIterator[None]:
        """Inside while the body runs. Raises EngineError while the gate refuses."""
        while self.is_shut:
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
