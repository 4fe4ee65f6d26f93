"""Has SGLang compute what requests that arrive together share, once, before it gets the requests.

After a weight sync, all paths of a tree ask again at once, and SGLang computes a prefix once for each request
of a batch that has it. Its own remedy (`schedule_policy: lpm`) puts requests off only if less than 32 of
their tokens are cached. So it helps with one level of a tree, and not at all if more than 128 requests wait.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import numpy as np

from sglang_rollout.shared_prefixes import plan_prefixes

SHORTEST = 32
"""Tokens that a shared prefix must have beyond those above it: a request of its own costs about as much."""
_MOST_KNOWN = 1 << 18  # then all are forgotten, and shared prefixes are asked for once more


class PrefixReader:
    """compute: has SGLang compute and cache a prefix (int32 [T]); returns how many tokens were not cached, or
    None if it was interrupted.
    """

    def __init__(self, compute: Callable[[np.ndarray], Coroutine[Any, Any, int | None]]) -> None:
        self._compute = compute
        self._known: set[tuple[int, int]] = set()
        self._arrived: list[tuple[np.ndarray, asyncio.Future[int]]] = []
        self._tasks: set[asyncio.Task[int]] = set()

    def forget(self) -> None:
        """SGLang's cache is empty."""
        self._known.clear()

    def note(self, path: np.ndarray) -> None:
        """SGLang has computed all tokens of the path (int32 [T]) but the last."""
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known.add(_key(path[:-1]))

    async def read(self, context: np.ndarray) -> int:
        """Return once SGLang has what the context shares with others that arrive in the same turn of the
        loop, or was interrupted.

        Returns the number of tokens that it computed on behalf of this context. Raises what `compute` raises.
        """
        loop = asyncio.get_running_loop()
        if not self._arrived:
            loop.call_soon(self._start)
        ready: asyncio.Future[int] = loop.create_future()
        self._arrived.append((context, ready))
        return await ready

    def _start(self) -> None:
        """Start the reads that the arrived requests need."""
        arrived = [(context, ready) for context, ready in self._arrived if not ready.done()]
        self._arrived = []
        contexts = [context for context, _ in arrived]
        if len(contexts) < 2:
            for _, ready in arrived:
                ready.set_result(0)
            return
        plan = plan_prefixes(contexts, SHORTEST, lambda prefix: _key(prefix) in self._known)
        tasks: list[asyncio.Task[int]] = []
        own: dict[int, list[asyncio.Task[int]]] = {}
        for prefix in plan.prefixes:
            after = None if prefix.after is None else tasks[prefix.after]
            tasks.append(asyncio.create_task(self._read(contexts[prefix.context][: prefix.length], after)))
            own.setdefault(prefix.context, []).append(tasks[-1])
        self._tasks.update(tasks)  # the loop keeps no reference
        for index, (needed, (_, ready)) in enumerate(zip(plan.needed, arrived, strict=True)):
            if needed is None:
                ready.set_result(0)
            else:
                tasks[needed].add_done_callback(partial(_settle, ready, own.get(index, [])))
        for task in tasks:
            task.add_done_callback(self._tasks.discard)

    async def _read(self, prefix: np.ndarray, after: "asyncio.Task[int] | None") -> int:
        """Compute a prefix after the one that it needs; returns the number of computed tokens."""
        if after is not None:
            await after
        computed = await self._compute(prefix)
        if computed is None:
            return 0
        self._known.add(_key(prefix))
        return computed


def _settle(ready: asyncio.Future[int], own: Sequence[asyncio.Task[int]], last: "asyncio.Task[int]") -> None:
    """Let a request go on after the last prefix that it needs. own: the prefixes read on its behalf."""
    error = last.exception()
    if ready.done():  # the request was cancelled
        return
    if error is None:
        ready.set_result(sum(task.result() for task in own))
    else:
        ready.set_exception(error)


def _key(tokens: np.ndarray) -> tuple[int, int]:
    """A collision costs a shared prefix that is computed more than once, no wrong token."""
    return len(tokens), hash(tokens.tobytes())
