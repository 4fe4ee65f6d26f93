"""The SGLang engine: samples, computes log-probs, and takes new weights.

Plain asyncio: construct it anywhere, use it on one running loop. Log-probs are those of the sampling
distribution (temperature applied). The radix-cache key of every request carries the weight version, so a
prefix that was computed with other weights is never matched. A weight sync is a transaction: after `begin`
nothing is served until `commit` has verified what arrived; if that fails, requests are refused until a later
update succeeds.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from sglang_rollout import control
from sglang_rollout.generation import Generation, StopRule, all_end_tokens
from sglang_rollout.prefix_reader import PrefixReader
from sglang_rollout.processes import SGLangProcesses
from sglang_rollout.rank_store import Meeting
from sglang_rollout.request_gate import RequestGate
from sglang_rollout.requests import SGLangRequests
from sglang_rollout.routes import RouteFormat
from sglang_rollout.served_adapter import ADAPTER
from sglang_rollout.weight_loader import End, Join, Load
from sglang_rollout.weight_update import WeightUpdate, adapter_shapes, check_manifest, checkpoint_shapes
from treepo.config.engine import EngineConfig
from treepo.config.trainer import LoraConfig
from treepo.errors import DeadEngineError, EngineError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.weight_sync.wire import Address, Bucket, Manifest

_log = logging.getLogger(__name__)
_REPORT_SECONDS = 5.0  # a rank that misses a transport's deadline reports it a little later
_POLL_SECONDS = 0.2  # between two checks of whether SGLang has answered anything
_INTERRUPT_SECONDS = 1.0  # between two interruptions of the same requests


class SGLangEngine:
    """Implements `treepo.protocols.Engine` and takes weight syncs.

    model: a Hugging Face folder. dtype: of the weights and the KV cache ("float32", "bfloat16"). stop_rule:
    called at the boundaries of `GenerateRequest.check_every`. shares_device: whether other work needs the
    device's memory at times (`offload`). paths_at_once: the most paths that it samples at once; None if
    unknown. routes: whether requests may ask for routes. lora: of the adapter that weight syncs bring in
    place of weights, which stay the folder's. meeting, store: for an engine on several nodes, of which this
    is the first (`SGLangProcesses`). Raises EngineError or ModelError if SGLang does not start on
    the folder, ModelError too if it shall return the routes of a model without experts.
    """

    def __init__(
        self,
        model: Path,
        dtype: str,
        config: EngineConfig,
        *,
        seed: int,
        stop_rule: StopRule | None = None,
        shares_device: bool = False,
        paths_at_once: int | None = None,
        routes: bool = False,
        lora: LoraConfig | None = None,
        meeting: Meeting | None = None,
        store: TCPStore | None = None,
    ) -> None:
        self.name = f"SGLang on {model}"
        self._config, self._lora = config, lora
        self._shapes = checkpoint_shapes(model)
        if lora is not None:
            self._shapes = adapter_shapes(self._shapes, lora)
        self._routes = RouteFormat.of(model) if routes else None
        self._sglang = SGLangProcesses(
            model,
            dtype,
            config,
            seed,
            shares_device=shares_device,
            paths_at_once=paths_at_once,
            routes=routes,
            lora=lora,
            meeting=meeting,
            store=store,
        )
        self._requests = SGLangRequests(self._sglang)
        self._generation = Generation(self._requests, stop_rule, all_end_tokens(model), self._routes)
        self._prefixes = PrefixReader(self._read_prefix)
        self._gate = RequestGate()
        self._version = 0
        self._update: WeightUpdate | None = None
        self._dirty = False  # whether the weights are of several versions

    @property
    def status(self) -> str:
        """For errors and the log."""
        if self._sglang.death.done():
            return f"down: {self._sglang.death.result()}"
        if self._gate.is_draining:
            return "updating its weights"
        if self._gate.is_held:
            return "held"
        return "serving" if self._gate.refusal is None else f"down: {self._gate.refusal}"

    @property
    def version(self) -> int:
        """The committed weight version; the model folder's own weights are 0."""
        return self._version

    def capacity(self) -> int:
        """Tokens in the KV cache, which all live prefixes share."""
        return self._sglang.kv_tokens

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Sample. Waits while the engine is held or updated. Raises EngineError with the reason.

        If a hold or an update begins meanwhile, returns the tokens that were sampled by then; if there are
        none, waits for its end and samples then.
        """
        self._check(request)
        while True:
            async with self._inside():
                output = await self._bounded_request(self._sample(request), "a request for tokens")
            if output is not None:
                return output

    async def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probs of all tokens but the first, given those before them, at temperature 1: float32 [T-1]."""
        async with self._inside():
            return await self._bounded_request(
                self._requests.log_probs(tokens, self._version), "a request for log-probs"
            )

    async def died(self) -> str:
        """Wait until the engine can no longer answer, and return why."""
        return await asyncio.shield(self._sglang.death)

    async def health_check(self) -> None:
        """Request one token, and return as soon as SGLang has answered any request: a busy engine is alive.

        Returns at once while the engine is held or updated: its memory may be offloaded, and a request would
        end SGLang. Raises EngineError if the engine refuses, and DeadEngineError as soon as it has died.
        """
        await self._bounded_request(self._first_answer(), "a health check")

    async def hold(self) -> None:
        """Interrupt running requests and make later ones wait until `release`; return once none is running.

        Raises EngineError if they do not end in time.
        """
        self._gate.hold()
        try:
            await self._bounded_update(self._interrupt(), "waiting for running requests")
        except EngineError:
            self._gate.release()
            raise

    def release(self) -> None:
        """End a hold."""
        self._gate.release()

    async def begin(self, version: int, manifest: Manifest) -> None:
        """Begin an update: interrupt running requests and make later ones wait. Replaces an earlier update
        that was not ended.

        Raises EngineError if the manifest does not fit the model or running requests do not end in time; the
        engine then goes on serving its weights.
        """
        check_manifest(manifest, self._shapes)
        self._gate.drain()
        try:
            await self._bounded_update(self._interrupt(), "waiting for running requests")
        except EngineError as error:
            self.abort(str(error))
            raise
        # An earlier update that was not ended may have overwritten weights.
        self._dirty = self._dirty or (self._update is not None and self._update.touched)
        self._update = WeightUpdate(version, manifest)

    async def join(self, addresses: Sequence[Address]) -> None:
        """Connect every rank to the sender of each lane. Raises TransportError."""
        self._updating()
        command = Join(addresses, of_adapter=self._lora is not None)
        await self._bounded_update(
            control.execute(self._sglang, command), "connecting to the senders", _REPORT_SECONDS
        )

    async def load(self, buckets: Sequence[Bucket | None]) -> None:
        """Overwrite the weights of a round's buckets, one of each lane. If that fails, raise EngineError and
        refuse requests.
        """
        update = self._updating()
        try:
            for bucket in buckets:
                update.add(bucket.tensors if bucket else ())
            command = Load(buckets, of_adapter=self._lora is not None)
            await self._bounded_update(
                control.execute(self._sglang, command), "loading weights", _REPORT_SECONDS
            )
        except EngineError as error:
            self._gate.close(f"its weights are incomplete ({error})")
            raise

    async def commit(self) -> int:
        """Serve and return the new version. If a tensor is missing, raise EngineError and refuse requests."""
        update = self._updating()
        try:
            update.check_complete()
            await self._bounded_update(control.execute(self._sglang, End(self._lora)), "ending the update")
            await self.clear_cache()
        except EngineError as error:
            self._gate.close(f"its weights are incomplete ({error})")
            raise
        self._sglang.manager.server_args.override("treepo", weight_version=str(update.version))
        self._version, self._update, self._dirty = update.version, None, False
        if self._lora is not None:
            self._requests.adapter = ADAPTER
        self._gate.open()
        return update.version

    def abort(self, reason: str) -> None:
        """End an update without a commit.

        The engine serves its old weights if none was overwritten; otherwise it refuses requests.
        """
        self._dirty = self._dirty or (self._update is not None and self._update.touched)
        self._update = None
        if self._dirty:
            self._gate.close(f"its weights are incomplete ({reason})")
        else:
            self._gate.open()

    async def clear_cache(self) -> None:
        """Forget every cached prefix. No request may be running."""
        self._prefixes.forget()
        flush = control.flush_cache(self._sglang, self._config.update_seconds)
        await self._bounded_update(flush, "flushing the prefix cache")

    async def offload(self) -> None:
        """Release the device memory until `reload`. Only while the engine is held.

        The weights stay in the host's memory. Only for an engine with `shares_device`.
        """
        await self.clear_cache()
        await self._bounded_update(control.offload(self._sglang), "offloading memory")

    async def reload(self, part: Literal["weights", "cache"]) -> None:
        """Take device memory again after `offload`: first for the weights, later for the cache."""
        await self._bounded_update(control.reload(self._sglang, part), "reloading memory")

    def close(self) -> None:
        """End SGLang's processes and no others. May be called again."""
        self._sglang.close()

    async def _bounded_update(self, work: Any, what: str, more_seconds: float = 0.0) -> None:
        await self._sglang.bounded(work, self._config.update_seconds + more_seconds, what)

    def _updating(self) -> WeightUpdate:
        if self._update is None:
            raise EngineError("no weight sync has begun")
        return self._update

    async def _bounded_request[T](self, work: Coroutine[Any, Any, T], what: str) -> T:
        return await self._sglang.bounded(work, self._config.request_seconds, what)

    @asynccontextmanager
    async def _inside(self) -> AsyncIterator[None]:
        """Be inside the gate while the body runs. The wait before it has no deadline: a hold may be long."""
        while self._gate.is_shut:
            await self._sglang.bounded(self._gate.settled(), None, "")
        with self._gate.inside():
            yield

    async def _interrupt(self) -> None:
        """Interrupt running requests, and wait until none is inside the gate."""
        while True:
            self._requests.interrupt()
            with suppress(TimeoutError):  # an abort that overtakes its request is lost, so it is repeated
                async with asyncio.timeout(_INTERRUPT_SECONDS):
                    return await self._gate.drained()

    def _check(self, request: GenerateRequest) -> None:
        """Raise EngineError for a request that cannot be served."""
        if request.check_every and not self._generation.checks:
            raise EngineError("check_every needs an engine with a stop rule")
        if request.routes_from is not None and self._routes is None:
            raise EngineError("routes_from needs an engine that was started to return routes")
        if len(request.context) + request.max_tokens > self._sglang.longest:
            raise EngineError(
                f"{request.max_tokens} tokens were requested after a context of {len(request.context)}; "
                f"together they may be {self._sglang.longest} (the model's positions, or its KV cache of "
                f"{self._sglang.kv_tokens} tokens, less what SGLang keeps free)"
            )

    async def _sample(self, request: GenerateRequest) -> GenerateOutput | None:
        """Sample; None if it was interrupted without a result."""
        computed = await self._prefixes.read(request.context)
        if self._gate.is_shut:  # SGLang does not have the request yet, so nothing has interrupted it
            return None
        output = await self._generation.sample(request, self._version)
        if output is None:
            return None
        self._prefixes.note(request.context)
        self._prefixes.note(np.concatenate([request.context, output.tokens]))
        return replace(output, cached_tokens=max(output.cached_tokens - computed, 0))

    async def _read_prefix(self, prefix: np.ndarray) -> int | None:
        """Compute a prefix that requests inside the gate share; None if that failed or was interrupted, since
        the requests can do without.
        """
        if self._gate.is_shut:
            return None
        with self._gate.inside():
            work = self._requests.read(prefix, self._version)
            try:
                return await self._bounded_request(work, "a request for a shared prefix")
            except DeadEngineError:
                raise
            except EngineError as error:
                _log.warning("%s: a shared prefix of %d tokens: %s", self.name, len(prefix), error)
                return None

    async def _first_answer(self) -> None:
        """Return when SGLang has answered a request for one token, or any other request."""
        if self._gate.is_shut:
            return
        manager = self._sglang.manager
        before = manager.last_receive_tstamp
        probe = asyncio.ensure_future(self._one_token())
        try:
            while not probe.done() and manager.last_receive_tstamp == before:
                await asyncio.wait((probe,), timeout=_POLL_SECONDS)
            if probe.done():
                probe.result()
        finally:
            probe.cancel()

    async def _one_token(self) -> None:
        token = np.zeros(1, dtype=np.int32)  # every vocabulary has token 0
        async with aclosing(self._requests.answers(token, {"max_new_tokens": 1}, self._version)) as answers:
            await anext(answers)
