"""Warns in the log when sampling stalls, naming each engine's state and its unanswered requests."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from treepo.protocols import Engine
from treepo.rollout.driver import PendingRequest, TreeDriver

_log = logging.getLogger(__name__)


@asynccontextmanager
async def watched(driver: TreeDriver, engines: Sequence[Engine], seconds: float) -> AsyncIterator[None]:
    """While the body samples, warn whenever requests wait and no engine of the driver has answered for
    `seconds`. A pause of sampling is no reason to warn.
    """
    watch = asyncio.create_task(_watch(driver, engines, seconds))
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait((watch,))


async def _watch(driver: TreeDriver, engines: Sequence[Engine], seconds: float) -> None:
    while True:
        before = driver.stats.requests, driver.stats.failed_requests
        await asyncio.sleep(seconds)
        if before != (driver.stats.requests, driver.stats.failed_requests) or driver.idle.paused:
            continue
        if pending := driver.pending():
            _log.warning("nothing was answered for %g s: %s", seconds, describe(pending, engines))


def describe(pending: Sequence[PendingRequest], engines: Sequence[Engine]) -> str:
    """Each engine's status, its number of unanswered requests, and the oldest of them."""
    return "; ".join(
        f"{engine.name} is {engine.status} with "
        f"{_unanswered([one for one in pending if one.engine == index])}"
        for index, engine in enumerate(engines)
    )


def _unanswered(pending: Sequence[PendingRequest]) -> str:
    if not pending:
        return "no unanswered requests"
    oldest = max(pending, key=lambda one: one.seconds)
    return (
        f"{len(pending)} unanswered requests, the oldest {oldest.seconds:.0f} s old: request "
        f"{oldest.number} of prompt {oldest.prompt_id}"
    )
