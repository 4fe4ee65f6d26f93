"""An engine in another process, as the rank that sends weights sees it."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from treepo.errors import EngineError
from treepo.weight_sync.wire import Address, Bucket


@dataclass(frozen=True)
class RemoteSink:
    """A `treepo.weight_sync.send.Sink` behind a Ray actor. key: the actor's own."""

    name: str
    key: str
    ranks: int
    actor: Any

    def join(self, address: Address) -> "Future[None]":
        return _with_engine_errors(self.actor.join.remote(address).future())

    def load(self, bucket: Bucket) -> "Future[None]":
        return _with_engine_errors(self.actor.load.remote(bucket).future())


def _with_engine_errors(call: "Future[None]") -> "Future[None]":
    """The same result; an error of the engine or its death is an EngineError."""
    result: Future[None] = Future()

    def done(call: "Future[None]") -> None:
        error = call.exception()
        if isinstance(error, RayTaskError) and isinstance(error.cause, EngineError):
            error = error.cause
        elif isinstance(error, RayActorError):
            error = EngineError(f"it died: {error}")
        if error is None:
            result.set_result(None)
        else:
            result.set_exception(error)

    call.add_done_callback(done)
    return result
