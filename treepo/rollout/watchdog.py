"""Says in the log who waits for what, where nothing goes on."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from treepo.protocols import Engine
from treepo.rollout.driver import TreeDriver, Waiting

_log = logging.getLogger(__name__)


@asynccontextmanager
async def watched(driver: TreeDriver, engines: Sequence[Engine], seconds: float) -> AsyncIterator[None]:
    """While the body samples: a warning whenever the driver's engines answered nothing for `seconds`."""
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
            _log.warning("nothing was answered for %g s: %s", seconds, describe(driver.waiting(), engines))


def describe(waiting: Sequence[Waiting], engines: Sequence[Engine]) -> str:
    """Each engine's state and what it owes, the oldest by name."""
    return "; ".join(
        f"{engine.name} is {engine.status} and {_owes([one for one in waiting if one.engine == index])}"
        for index, engine in enumerate(engines)
    )


def _owes(waiting: Sequence[Waiting]) -> str:
    if not waiting:
        return "owes nothing"
    oldest = max(waiting, key=lambda one: one.seconds)
    return (
        f"owes {len(waiting)} answers, the oldest to request {oldest.ask} of prompt {oldest.prompt_id}, "
        f"asked {oldest.seconds:.0f} s ago"
    )
