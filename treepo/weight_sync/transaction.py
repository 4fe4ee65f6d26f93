"""A weight update is a transaction: pause, send, verify, commit the version, resume.

An engine serves nothing from `begin` to `commit`; prefixes cached under another version can never match
afterwards. Who fails on the way is left out, and the others commit: where one failure ruins what they share,
they begin anew without it.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from treepo.cluster.engine_pool import Fleet
from treepo.cluster.supervised_engine import EngineProcess
from treepo.errors import EngineError
from treepo.weight_sync.send import Outcome, Sink
from treepo.weight_sync.wire import Manifest

_log = logging.getLogger(__name__)
_GRACE_SECONDS = 20.0  # an engine's own deadlines come first


class Trainer(Protocol):
    """The trainer's side: `treepo.cluster.trainer_group.TrainerGroup`."""

    async def manifest(self) -> Manifest: ...

    async def send_weights(self, version: int, sinks: Sequence[Any]) -> Outcome: ...


class Updatable(Protocol):
    """An engine; `call` reaches the methods of `treepo.protocols.WeightSink`."""

    @property
    def name(self) -> str: ...

    async def call(self, method: str, *arguments: object) -> Any: ...

    def sink(self) -> Sink:
        """The same engine as the rank that sends sees it."""
        ...


class Update[E: Updatable]:
    """One update of some engines. failed: who is left out, and why."""

    def __init__(self, trainer: Trainer, version: int, seconds: float) -> None:
        self.failed: dict[E, str] = {}
        self._trainer, self._version = trainer, version
        self._seconds = seconds + _GRACE_SECONDS

    async def run(self, engines: Sequence[E]) -> list[E]:
        """Returns those that committed. Raises what the trainer raises: then nobody has."""
        manifest = await self._trainer.manifest()
        live = list(engines)
        try:
            for _ in range(1 + len(engines)):  # each attempt but the last finds somebody at fault
                live = await self._each(live, "begin", self._version, manifest)
                if not live:
                    return []
                outcome = await self._trainer.send_weights(self._version, [one.sink() for one in live])
                self.failed |= {one: outcome.failed[one.name] for one in live if one.name in outcome.failed}
                live = [one for one in live if one not in self.failed]
                if outcome.broken is None:
                    return await self._each(live, "commit")
                _log.warning(
                    "weights, version %d: %s; %d begin anew", self._version, outcome.broken, len(live)
                )
        except BaseException:
            await self._abort(live, "the trainer did not send them all")
            raise
        self.failed |= dict.fromkeys(live, "what the engines share broke again and again")
        return []

    async def end(self) -> None:
        """Those that failed may serve what they served, if that is whole."""
        await self._abort(self.failed, "it failed in a weight update")

    async def _each(self, engines: Sequence[E], method: str, *arguments: object) -> list[E]:
        """Call all of them; returns those that succeeded."""
        outcomes = await asyncio.gather(*(self._call(engine, method, *arguments) for engine in engines))
        self.failed |= {engine: str(error) for engine, error in zip(engines, outcomes, strict=True) if error}
        return [engine for engine in engines if engine not in self.failed]

    async def _abort(self, engines: Iterable[E], reason: str) -> None:
        for error in await asyncio.gather(*(self._call(engine, "abort", reason) for engine in engines)):
            if error is not None:
                _log.warning("%s", error)

    async def _call(self, engine: E, method: str, *arguments: object) -> EngineError | None:
        try:
            async with asyncio.timeout(self._seconds):
                await engine.call(method, *arguments)
        except TimeoutError:
            return EngineError(f"{engine.name}: {method}: no answer within {self._seconds:g} s")
        except EngineError as error:
            return error
        return None


async def update_weights[E: Updatable](
    trainer: Trainer, engines: Sequence[E], version: int, seconds: float
) -> dict[E, str]:
    """Every engine serves the trainer's weights as `version`, but for those that are returned, with reasons.

    Those serve what they served, if that is whole, or nothing. seconds: deadline of each of an engine's
    steps. Raises EngineError where no engine took the weights, and what the trainer raises.
    """
    update = Update[E](trainer, version, seconds)
    committed = await update.run(engines)
    await update.end()
    if not committed:
        reasons = "; ".join(f"{engine.name}: {reason}" for engine, reason in update.failed.items())
        raise EngineError(f"no engine took the weights of version {version}: {reasons}")
    return update.failed


async def sync_weights[P: EngineProcess](
    trainer: Trainer, fleet: Fleet[P], version: int, seconds: float
) -> None:
    """Every engine of the fleet that serves gets the weights; one that does not take them is replaced.

    Where none serves, or none takes them, their successors will. Raises what the trainer raises.
    """
    served = {engine.process: engine for engine in fleet.serving()}
    try:
        failed = await update_weights(trainer, list(served), version, seconds) if served else {}
    except EngineError as error:
        failed = dict.fromkeys(served, str(error))
    for process, reason in failed.items():
        served[process].fail(reason)
