"""A weight update is a transaction: pause, send, verify, commit the version, resume.

An engine serves nothing from `begin` to `commit`; prefixes cached under another version can never match
afterwards. Who fails on the way is left out, and the others commit: where one failure ruins what they share,
they begin anew without it.
"""

import asyncio
import logging
from collections.abc import Sequence

from treepo.errors import EngineError
from treepo.orchestration.engines import RemoteEngine
from treepo.orchestration.learners import LearnerGroup

_log = logging.getLogger(__name__)


async def update_weights(
    learner: LearnerGroup, engines: Sequence[RemoteEngine], version: int
) -> dict[RemoteEngine, str]:
    """Every engine serves the learner's weights as `version`, but for those that are returned, with reasons.

    Those refuse to serve until a later update succeeds. Raises EngineError where no engine is left, and what
    the learner raises: no engine serves the new version then.
    """
    failed: dict[RemoteEngine, str] = {}
    manifest = await learner.manifest()
    live = await _each(engines, "begin", failed, version, manifest)
    attempts = 1 + len(engines)  # each but the last finds somebody at fault
    for _ in range(attempts):
        if not live:
            break
        try:
            outcome = await learner.send_weights(version, [engine.sink() for engine in live])
        except BaseException:
            await asyncio.gather(*(_abandon(engine, "the trainer did not send them all") for engine in live))
            raise
        failed |= {engine: outcome.failed[engine.name] for engine in live if engine.name in outcome.failed}
        live = [engine for engine in live if engine not in failed]
        if outcome.broken is None:
            live = await _each(live, "commit", failed)
            break
        _log.warning("weights, version %d: %s; %d engines begin anew", version, outcome.broken, len(live))
        live = await _each(live, "begin", failed, version, manifest)
    else:
        failed |= dict.fromkeys(live, "the transport broke again and again")
        live = []
    await asyncio.gather(*(_abandon(engine, reason) for engine, reason in failed.items()))
    if not live:
        reasons = "; ".join(f"{engine.name}: {reason}" for engine, reason in failed.items())
        raise EngineError(f"no engine took the weights of version {version}: {reasons}")
    return failed


async def _each(
    engines: Sequence[RemoteEngine], method: str, failed: dict[RemoteEngine, str], *arguments: object
) -> list[RemoteEngine]:
    """Call all of them; returns those that succeeded, and adds the others to `failed`."""
    calls = (engine.call(method, *arguments) for engine in engines)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for engine, outcome in zip(engines, outcomes, strict=True):
        if isinstance(outcome, EngineError):
            failed[engine] = str(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
    return [engine for engine in engines if engine not in failed]


async def _abandon(engine: RemoteEngine, reason: str) -> None:
    """Tell an engine, which may be dead."""
    try:
        await engine.call("abandon", reason)
    except EngineError as error:
        _log.warning("%s", error)
