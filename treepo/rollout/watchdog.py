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
    """While the body samples, warn whenever no engine of the driver has answered for `seconds`."""
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
        if before == (driver.stats.requests, driver.stats.failed_requests):
            _log.warning("nothing was answered for %g s: %s", seconds, describe(driver.pending(), engines))


def describe(pending: Sequence[PendingRequest], engines: Sequence[Engine]) -> str:
    """Each engine's status, how many answers it owes, and the oldest request that it has not answered."""
    return "; ".join(
        f"{engine.name} is {engine.status} and {_owes([one for one in pending if one.engine == index])}"
        for index, engine in enumerate(engines)
    )


def _owes(pending: Sequence[PendingRequest]) -> str:
    if not pending:
        return "owes nothing"
    oldest = max(pending, key=lambda one: one.seconds)
    return (
        f"owes {len(pending)} answers, the oldest to request {oldest.number} of prompt {oldest.prompt_id}, "
        f"asked {oldest.seconds:.0f} s ago"
    )
