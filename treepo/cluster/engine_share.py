"""The ranks of an engine on one node, in a Ray actor there.

The first share of an engine answers its requests (treepo.cluster.ray_engine). Further shares, of an engine
that one node cannot hold, only host ranks and say when one of them ends.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from sglang_rollout.processes import SGLangProcesses
from sglang_rollout.rank_store import Meeting
from treepo.cluster.actor_death import death_of, note_start, own_last_lines
from treepo.cluster.ray_actor import own_error, use_interface_of_node
from treepo.cluster.ray_watch import unless_lost
from treepo.errors import ClusterError, DeadEngineError, TreepoError, one_line

_log = logging.getLogger(__name__)
_LAST_LINES_SECONDS = 10
_END_SECONDS = 30  # for a share to end its processes; then its actor is killed, and they end with it


class HostedShare:
    """SGLang's processes of a further share of an engine, in an actor on their node.

    settings: of `SGLangProcesses`. The first share calls `start` once it knows where all meet; if that fails,
    `ready` raises the error.
    """

    def __init__(self, *settings: Any, **named: Any) -> None:
        note_start()
        use_interface_of_node()  # SGLang's processes inherit it
        self._settings, self._named = settings, named
        self._processes: SGLangProcesses | None = None
        self._failure: Exception | None = None
        self._started = asyncio.Event()

    def start(self, meeting: Meeting) -> None:
        try:
            self._processes = SGLangProcesses(*self._settings, **self._named, meeting=meeting)
        except Exception as error:  # nobody waits for this call: `ready` tells
            self._failure = error
        self._started.set()

    async def ready(self) -> None:
        """Wait until the model is loaded."""
        await self._started.wait()
        if self._failure is not None:
            raise self._failure

    async def died(self) -> str:
        """Wait until a process of this share has ended, and return why."""
        await self.ready()
        assert self._processes is not None
        return await asyncio.shield(self._processes.death)

    def last_lines(self) -> str:
        assert self._processes is not None
        return own_last_lines([child.pid for child in self._processes._children])

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()


class Share:
    """A share of an engine, by its actor. A TreepoError raised in the actor arrives with the share's name."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.actor = actor
        self._said: asyncio.Future[str] | None = None  # the cause of death, asked for once
        self._started = False

    async def ready(self) -> None:
        """Wait until the model is loaded."""
        await self._answer(self.actor.ready)
        self._started = True

    async def wait_for_death(self) -> str:
        return f"{await self._answer(self.actor.died)}; {await self._once(self._last_lines())}"

    async def end(self) -> None:
        """End SGLang's processes, then the actor; processes that are left end with it."""
        try:
            if self._started:  # an actor that starts SGLang answers no call
                async with asyncio.timeout(_END_SECONDS):
                    await self._answer(self.actor.close)
        except (DeadEngineError, ClusterError):
            pass  # the actor itself has died, or Ray, whose watch ends what is left
        except (TimeoutError, TreepoError) as error:
            reason = one_line(error) or f"no answer within {_END_SECONDS} s"
            _log.warning("%s did not close and is killed: %s", self.name, reason)
        finally:
            ray.kill(self.actor)

    async def _answer(self, method: Any, *arguments: object) -> Any:
        """Call a method of the actor. Cancelling this call cancels the method in the actor too."""
        reference = method.remote(*arguments)
        try:
            return await unless_lost(reference)
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except (RayTaskError, RayActorError) as error:
            raise await self._own(error) from None

    async def _own(self, error: RayTaskError | RayActorError) -> BaseException:
        """Our own error in place of Ray's, with the engine's name. A fault is an ActorError, whose traceback
        is in the log.
        """
        if isinstance(error, RayActorError):
            return DeadEngineError(f"{self.name}: {await self._once(death_of(error))}")
        own = own_error(error, DeadEngineError)
        if isinstance(own, DeadEngineError):
            return DeadEngineError(f"{self.name}: {own}; {await self._once(self._last_lines())}")
        return type(own)(f"{self.name}: {own}") if isinstance(own, TreepoError) else own

    async def _once(self, ask: Coroutine[Any, Any, str]) -> str:
        """The answer to the first question after the death, for all calls that fail with it."""
        if self._said is None:
            self._said = asyncio.ensure_future(ask)
        else:
            ask.close()
        return await asyncio.shield(self._said)

    async def _last_lines(self) -> str:
        """What SGLang's processes said last; the actor outlives them."""
        try:
            async with asyncio.timeout(_LAST_LINES_SECONDS):
                return await self.actor.last_lines.remote()
        except (RayTaskError, RayActorError, TimeoutError) as error:
            return f"its last lines cannot be read: {type(error).__name__}"
