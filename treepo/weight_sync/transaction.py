"""One weight sync of several engines as a transaction: begin, send, commit or abort.

An engine answers no request from `begin` to `commit`, and a prefix cached under another version never matches
afterwards. An engine that fails is left out, and the others commit. If its failure breaks a transport that
all engines share, the others begin again without it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol

from treepo.errors import EngineError, TransportError
from treepo.watchdog import waiting
from treepo.weight_sync.send import Outcome, WeightSink
from treepo.weight_sync.wire import Manifest

_log = logging.getLogger(__name__)
GRACE_SECONDS = 20.0
"""For an engine's answer beyond a deadline of its own."""


class WeightSender(Protocol):
    """The trainer as the transaction uses it; `treepo.cluster.trainer_group.TrainerGroup` implements it."""

    async def manifest(self) -> Manifest:
        """All tensors of the model, in the order in which they are sent."""
        ...

    async def send_weights(self, version: int, sinks: Sequence[Any]) -> Outcome:
        """Send every tensor to every sink; the engines have begun an update to `version`."""
        ...

    async def release_cache(self) -> None:
        """Return unused device memory to the device, so that other processes can use it."""
        ...


class ReceivingEngine(Protocol):
    """An engine that takes weights. Every call raises EngineError if it fails."""

    @property
    def name(self) -> str: ...

    async def begin(self, version: int, manifest: Manifest) -> None:
        """Stop serving: running requests are interrupted, later ones wait."""
        ...

    def sink(self) -> WeightSink:
        """The engine as trainer rank 0 uses it; can be pickled to that rank's process."""
        ...

    async def commit(self) -> None:
        """Verify that every tensor arrived, and serve the new version."""
        ...

    async def abort(self, reason: str) -> None:
        """Serve the old version if none of its weights was overwritten; otherwise refuse requests."""
        ...


class UpdateFailedError(EngineError):
    """No engine took an update. failed: the error of each engine."""

    def __init__(self, version: int, failed: Mapping[Any, EngineError]) -> None:
        reasons = "; ".join(f"{engine.name}: {error}" for engine, error in failed.items())
        super().__init__(f"no engine took the weights of version {version}: {reasons}")
        self.failed = failed


async def update_weights[E: ReceivingEngine](
    trainer: WeightSender, engines: Sequence[E], version: int, seconds: float
) -> dict[E, EngineError]:
    """Make the engines serve the trainer's weights as `version`; returns those that failed, with the error of
    each: a DeadEngineError or TransportError if another attempt may succeed.

    An engine that fails keeps its old weights if none was overwritten; otherwise it refuses requests.
    seconds: deadline of each step of an engine. Raises UpdateFailedError if every engine failed, and passes
    on the trainer's errors; no engine serves the version then.
    """
    transaction = _Transaction[E](trainer, version, seconds)
    committed = await transaction.run(engines)
    await transaction.abort_failed()
    if not committed:
        raise UpdateFailedError(version, transaction.failed)
    return transaction.failed


class _Transaction[E: ReceivingEngine]:
    """failed: the engines that are left out, with their errors."""

    def __init__(self, trainer: WeightSender, version: int, seconds: float) -> None:
        self.failed: dict[E, EngineError] = {}
        self._trainer, self._version = trainer, version
        self._seconds = seconds + GRACE_SECONDS

    async def run(self, engines: Sequence[E]) -> list[E]:
        """Update the engines, and return those that committed. If the trainer raises an error, none has."""
        manifest = await self._trainer.manifest()
        live = list(engines)
        try:
            for _ in range(1 + len(engines)):  # every attempt but the last leaves an engine out
                live = await self._each(live, "begin", lambda engine: engine.begin(self._version, manifest))
                if not live:
                    return []
                outcome = await self._trainer.send_weights(self._version, [one.sink() for one in live])
                for remark in outcome.remarks:
                    _log.log(remark.level, remark.text)
                self.failed |= {one: outcome.failed[one.name] for one in live if one.name in outcome.failed}
                live = [one for one in live if one not in self.failed]
                if outcome.broken is None:
                    return await self._each(live, "commit", lambda engine: engine.commit())
                _log.warning(
                    "weights of version %d: %s; %d engines begin again",
                    self._version,
                    outcome.broken,
                    len(live),
                )
        except BaseException:
            await self._abort(live, "the trainer did not send them all")
            raise
        broken = TransportError("the transport that all engines share broke at every attempt")
        self.failed |= dict.fromkeys(live, broken)
        return []

    async def abort_failed(self) -> None:
        """Let the engines that failed serve their old weights, if these are whole."""
        await self._abort(self.failed, "it failed in a weight sync")

    async def _each(
        self, engines: Sequence[E], step: str, call: Callable[[E], Coroutine[Any, Any, None]]
    ) -> list[E]:
        """Take a step on all engines at once; returns those that succeeded."""
        outcomes = await asyncio.gather(*(self._bounded(engine, step, call(engine)) for engine in engines))
        self.failed |= {engine: error for engine, error in zip(engines, outcomes, strict=True) if error}
        return [engine for engine in engines if engine not in self.failed]

    async def _abort(self, engines: Iterable[E], reason: str) -> None:
        calls = (self._bounded(engine, "abort", engine.abort(reason)) for engine in engines)
        for error in await asyncio.gather(*calls):
            if error is not None:
                _log.warning("%s", error)

    async def _bounded(self, engine: E, step: str, call: Coroutine[Any, Any, None]) -> EngineError | None:
        try:
            with waiting(f"the weight sync ({step})", engine.name):
                async with asyncio.timeout(self._seconds):
                    await call
        except TimeoutError:
            return TransportError(f"{engine.name}: {step}: no answer within {self._seconds:g} s")
        except EngineError as error:
            return error
        return None
