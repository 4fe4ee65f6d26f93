"""The SGLang engine: samples, computes log-probs, and takes new weights.

Plain asyncio: construct it anywhere, use it on one running loop. Log-probs are those of the sampling
distribution (temperature applied). The radix-cache key of every request carries the weight version, so a
prefix that was computed with other weights is never matched. A weight sync is a transaction: after `begin`
nothing is served until `commit` has verified what arrived; if that fails, requests are refused until a later
update succeeds.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sglang_rollout.processes import SGLangProcesses
from sglang_rollout.request_gate import RequestGate
from sglang_rollout.weight_loader import LOADER, Command, End, Join, Load, Receipts
from sglang_rollout.weight_update import WeightUpdate, check_manifest, checkpoint_shapes
from treepo.config.engine import EngineConfig
from treepo.data.tokenizer import end_tokens, has_tokenizer, load_tokenizer
from treepo.errors import EngineError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.weight_sync.wire import Address, Bucket, Manifest

_REPORT_SECONDS = 5.0  # a rank that misses a transport's deadline reports it a little later
_POLL_SECONDS = 0.2  # between two checks of whether SGLang has answered anything

StopRule = Callable[[np.ndarray], bool]
"""Whether a response (int32 [T], prompt excluded) needs no further tokens."""


class SGLangEngine:
    """Implements `treepo.protocols.Engine` and takes weight syncs.

    model: a Hugging Face folder. dtype: of the weights and the KV cache ("float32", "bfloat16"). stop_rule:
    called at the boundaries of `GenerateRequest.check_every`. shares_device: whether other work needs the
    device's memory at times (`offload`). paths_at_once: the most paths that it samples at once; None if
    unknown. Raises EngineError or ModelError if SGLang does not start on the folder.
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
    ) -> None:
        self.name = f"SGLang on {model}"
        self._config = config
        self._stop_rule = stop_rule
        self._end_tokens = _end_tokens(model)
        self._shapes = checkpoint_shapes(model)
        self._sglang = SGLangProcesses(
            model, dtype, config, seed, shares_device=shares_device, paths_at_once=paths_at_once
        )
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
        return "serving" if self._gate.refusal is None else f"down: {self._gate.refusal}"

    @property
    def version(self) -> int:
        """The committed weight version; the model folder's own weights are 0."""
        return self._version

    def capacity(self) -> int:
        """Tokens in the KV cache, which all live prefixes share."""
        return self._sglang.kv_tokens

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Sample. Waits while an update is under way. Raises EngineError with the reason.

        With `check_every`, decoding also ends at the next boundary after an update begins: the new weights
        then sample the rest of the path.
        """
        return await self._sglang.bounded(
            self._generate(request), self._config.request_seconds, "a request for tokens"
        )

    async def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probs of all tokens but the first, given those before them, at temperature 1: float32 [T-1]."""
        return await self._sglang.bounded(
            self._log_probs(tokens), self._config.request_seconds, "a request for log-probs"
        )

    async def died(self) -> str:
        """Wait until the engine can no longer answer, and return why."""
        return await asyncio.shield(self._sglang.death)

    async def health_check(self) -> None:
        """Request one token, and return as soon as SGLang has answered any request: a busy engine is alive.

        Raises EngineError if the engine refuses, and DeadEngineError as soon as it has died.
        """
        await self._sglang.bounded(self._first_answer(), self._config.request_seconds, "a health check")

    async def begin(self, version: int, manifest: Manifest) -> None:
        """Begin an update: later requests wait, running ones end. Replaces an earlier update that was not
        ended.

        Raises EngineError if the manifest does not fit the model or running requests do not end in time; the
        engine then goes on serving its weights.
        """
        check_manifest(manifest, self._shapes)
        self._gate.drain()
        try:
            await self._bounded_update(self._gate.drained(), "waiting for running requests")
        except EngineError as error:
            self.abort(str(error))
            raise
        # An earlier update that was not ended may have overwritten weights.
        self._dirty = self._dirty or (self._update is not None and self._update.touched)
        self._update = WeightUpdate(version, manifest)

    async def join(self, address: Address) -> None:
        """Connect every rank to the sender of the update. Raises TransportError."""
        self._updating()
        await self._bounded_update(self._execute(Join(address)), "connecting to the sender", _REPORT_SECONDS)

    async def load(self, bucket: Bucket) -> None:
        """Overwrite the bucket's weights. If that fails, raise EngineError and refuse requests."""
        update = self._updating()
        try:
            update.add(bucket.tensors)
            await self._bounded_update(self._execute(Load(bucket)), "loading weights", _REPORT_SECONDS)
        except EngineError as error:
            self._gate.close(f"its weights are incomplete ({error})")
            raise

    async def commit(self) -> int:
        """Serve and return the new version. If a tensor is missing, raise EngineError and refuse requests."""
        update = self._updating()
        try:
            update.check_complete()
            await self._bounded_update(self._execute(End()), "ending the update")
            await self.clear_cache()
        except EngineError as error:
            self._gate.close(f"its weights are incomplete ({error})")
            raise
        self._sglang.manager.server_args.override("treepo", weight_version=str(update.version))
        self._version, self._update, self._dirty = update.version, None, False
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
        await self._bounded_update(self._flush(), "flushing the prefix cache")

    async def offload(self) -> None:
        """Release the device memory until `reload`; no request may run or arrive meanwhile.

        The weights stay in the host's memory. Only for an engine with `shares_device`.
        """
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        await self._bounded_update(self._flush(), "flushing the prefix cache")
        release = self._sglang.manager.release_memory_occupation(ReleaseMemoryOccupationReqInput())
        await self._bounded_update(release, "offloading memory")

    async def reload(self, part: Literal["weights", "cache"]) -> None:
        """Take device memory again after `offload`: first for the weights, later for the cache."""
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        tags = {"weights": ["weights"], "cache": ["kv_cache", "cuda_graph"]}[part]
        resume = self._sglang.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
        await self._bounded_update(resume, "reloading memory")

    def close(self) -> None:
        """End SGLang's processes and no others. May be called again."""
        self._sglang.close()

    async def _bounded_update(self, work: Any, what: str, more_seconds: float = 0.0) -> None:
        await self._sglang.bounded(work, self._config.update_seconds + more_seconds, what)

    def _updating(self) -> WeightUpdate:
        if self._update is None:
            raise EngineError("no weight sync has begun")
        return self._update

    async def _generate(self, request: GenerateRequest) -> GenerateOutput:
        if request.check_every and self._stop_rule is None:
            raise EngineError("check_every needs an engine with a stop rule")
        if len(request.context) + request.max_tokens > self._sglang.longest:
            raise EngineError(
                f"{request.max_tokens} tokens were requested after a context of {len(request.context)}; "
                f"together they may be {self._sglang.longest} (the model's positions, or its KV cache of "
                f"{self._sglang.kv_tokens} tokens, less what SGLang keeps free)"
            )
        sampling = {
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "stop_token_ids": sorted(self._end_tokens),
            "sampling_seed": request.seed,
            "stream_interval": request.check_every or None,
        }
        async with (
            self._gate.request(),
            aclosing(self._answers(request.context, sampling, stream=request.check_every > 0)) as answers,
        ):
            checked = 0
            output = {}
            async for output in answers:
                tokens = output["output_ids"]
                for boundary in _boundaries(request.check_every, checked, len(tokens)):
                    if self._gate.is_draining or self._should_stop(request, tokens[:boundary]):
                        return self._output(output, boundary)
                    checked = boundary
            return self._output(output, len(output["output_ids"]))

    def _should_stop(self, request: GenerateRequest, tokens: list[int]) -> bool:
        """Whether the stop rule holds for the response that ends with the new `tokens`."""
        assert self._stop_rule is not None
        above = request.context[request.prompt_tokens :]
        return self._stop_rule(np.concatenate([above, np.asarray(tokens, dtype=np.int32)]))

    def _output(self, output: dict[str, Any], length: int) -> GenerateOutput:
        """The first `length` tokens of what SGLang sampled."""
        meta = output["meta_info"]
        tokens = np.asarray(output["output_ids"][:length], dtype=np.int32)
        sampled = meta["output_token_logprobs"][:length]
        log_probs = np.asarray([log_prob for log_prob, _, _ in sampled], dtype=np.float32)
        if not 0 < len(tokens) == len(log_probs):
            raise EngineError(f"SGLang returned {len(tokens)} tokens and {len(log_probs)} log-probs")
        if not np.isfinite(log_probs).all():
            raise EngineError("SGLang returned a log-prob that is not finite: the weights may have diverged")
        if meta["weight_version"] != str(self._version):
            raise EngineError(
                f"SGLang sampled with weights of version {meta['weight_version']}, not {self._version}"
            )
        return GenerateOutput(
            tokens=tokens,
            log_probs=log_probs,
            version=self._version,
            finish="eos" if int(tokens[-1]) in self._end_tokens else "length",
            cached_tokens=meta["cached_tokens"],
        )

    async def _log_probs(self, tokens: np.ndarray) -> np.ndarray:
        async with (
            self._gate.request(),
            aclosing(self._answers(tokens, {"max_new_tokens": 0}, of_context=True)) as answers,
        ):
            output = await anext(answers)
        computed = output["meta_info"]["input_token_logprobs"][1:]
        return np.asarray([log_prob for log_prob, _, _ in computed], dtype=np.float32)

    async def _first_answer(self) -> None:
        """Return when SGLang has answered a request for one token, or any other request."""
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
        async with aclosing(self._answers(token, {"max_new_tokens": 1})) as answers:
            await anext(answers)

    async def _answers(
        self,
        context: np.ndarray,
        sampling: dict[str, Any],
        *,
        stream: bool = False,
        of_context: bool = False,
    ) -> AsyncGenerator[dict[str, Any]]:
        """SGLang's answers to one request, each with all tokens so far. Closing it early aborts the request.

        of_context: whether log-probs of the context's tokens are computed too.
        """
        from fastapi import HTTPException
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager = self._sglang.manager
        if context.max() >= manager.model_config.vocab_size or context.min() < 0:
            raise EngineError(
                f"the context has tokens from {context.min()} to {context.max()}; the model has a vocabulary "
                f"of {manager.model_config.vocab_size}"
            )
        request = GenerateReqInput(
            rid=uuid.uuid4().hex,
            input_ids=context.tolist(),
            sampling_params=sampling,
            return_logprob=True,
            logprob_start_len=0 if of_context else -1,
            stream=stream,
            extra_key=f"v{self._version}",
        )
        finish = None
        try:
            async with aclosing(manager.generate_request(request)) as answers:
                async for answer in answers:
                    finish = answer["meta_info"]["finish_reason"]
                    if finish is not None and finish["type"] == "abort":
                        raise EngineError(f"SGLang ended a request: {finish.get('message')}")
                    yield answer
        except (ValueError, HTTPException) as error:
            raise EngineError(f"SGLang refused a request of {len(context)} tokens: {error}") from error
        finally:
            if finish is None and not self._sglang.death.done():
                manager.abort_request(request.rid)

    async def _execute(self, command: Command) -> None:
        """Make every rank of SGLang execute a command about weights. Raises the failure of a rank."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        ranks = self._sglang.ranks
        receipts = Receipts(ranks)
        try:
            named = [("command", receipts.message(command))]
            # One message for each rank: the shared memory that a message names can be taken once.
            payloads: Any = [MultiprocessingSerializer.serialize(named) for _ in range(ranks)]
            request = UpdateWeightsFromTensorReqInput(
                serialized_named_tensors=payloads, load_format=LOADER, flush_cache=False
            )
            success, message = await self._sglang.manager.update_weights_from_tensor(request)
            if not success:
                raise EngineError(f"SGLang did not load weights: {message}")
            receipts.check()
        finally:
            receipts.close()

    async def _flush(self) -> None:
        """Free the memory of all cached prefixes."""
        flushed = await self._sglang.manager.flush_cache(timeout_s=self._config.update_seconds)
        if not flushed.success:
            raise EngineError(f"SGLang did not flush its prefix cache: {flushed.message}")


def _boundaries(step: int, checked: int, sampled: int) -> range:
    """Multiples of `step` above `checked` and below `sampled`; none if `step` is 0."""
    return range(checked + step, sampled, step) if step else range(0)


def _end_tokens(model: Path) -> frozenset[int]:
    """End tokens of the model and, if the folder has one, of the tokenizer. An engine needs no tokenizer."""
    return frozenset(load_tokenizer(model).end_tokens if has_tokenizer(model) else end_tokens(model))
