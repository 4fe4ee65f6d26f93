"""A real SGLang engine behind the project's small protocols.

Plain asyncio: construct it anywhere, use it on one running loop. Log-probs are those of the distribution
that was sampled from (temperature applied). Every request's radix-cache key carries the weight version, so
a prefix computed with other weights can never be matched. An update is a transaction: after `begin` nothing
is served until `commit` has verified what arrived; where that fails, requests are refused until a later
update succeeds.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sglang_rollout.receiver import LOADER, Action, End, Join, Load, Receipts
from sglang_rollout.request_gate import Gate
from sglang_rollout.server import Server
from sglang_rollout.weights import Update, check_manifest, checkpoint_shapes
from treepo.config.engine import EngineConfig
from treepo.data.tokenizer import end_tokens, has_tokenizer, load_tokenizer
from treepo.errors import EngineError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.weight_sync.wire import Address, Bucket, Manifest

_REPORT_SECONDS = 5.0  # a rank that missed a transport's deadline says so a little after it

_LOOK_SECONDS = 0.2  # between two looks at whether SGLang has answered anything

StopRule = Callable[[np.ndarray], bool]
"""Whether a response (int32 [T], prompt excluded) needs no further tokens."""


class SGLangEngine:
    """Implements `treepo.protocols.Engine` and `WeightSink`.

    model: a Hugging Face folder. dtype: of the weights and the KV cache ("float32", "bfloat16").
    stop_rule: what `GenerateRequest.check_every` asks at its boundaries. shares_device: whether others will
    need its device's memory at times (`release_memory`).
    Raises EngineError or ModelError where SGLang does not start on the folder.
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
    ) -> None:
        self._config = config
        self._stop_rule = stop_rule
        self._end_tokens = _end_tokens(model)
        self._shapes = checkpoint_shapes(model)
        self._server = Server(model, dtype, config, seed, shares_device)
        self._gate = Gate()
        self._version = 0
        self._update: Update | None = None
        self._dirty = False  # some weights are of no version

    @property
    def version(self) -> int:
        """The committed weight version; the model folder's own weights are 0."""
        return self._version

    def capacity(self) -> int:
        """Tokens in the KV cache, shared by all live prefixes."""
        return self._server.capacity

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Sample. Waits while an update is under way. Raises EngineError, naming the reason.

        With `check_every`, decoding also ends at the next boundary when an update begins: the rest of the
        path is then sampled by the new weights.
        """
        return await self._server.bounded(
            self._generate(request), self._config.request_seconds, "a request for tokens"
        )

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """Log-prob of each token but the first given those before it, at temperature 1: float32 [T-1]."""
        return await self._server.bounded(
            self._score(tokens), self._config.request_seconds, "a request for log-probs"
        )

    async def died(self) -> str:
        """Why this engine can answer nothing any more, as soon as that is so."""
        return await asyncio.shield(self._server.death)

    async def health_check(self) -> None:
        """Ask for one token; returns as soon as SGLang has answered anything at all: who is busy is alive.

        Raises EngineError where it refuses, and DeadEngineError as soon as it has died.
        """
        await self._server.bounded(self._show_life(), self._config.request_seconds, "a sign of life")

    async def begin(self, version: int, manifest: Manifest) -> None:
        """Stop serving: later requests wait, running ones end. Begins anew where an update was left open.

        Raises EngineError, and goes on serving what it served, where the manifest does not fit the model or
        running requests do not end in time.
        """
        check_manifest(manifest, self._shapes)
        self._gate.shut()
        try:
            await self._bounded_update(self._gate.empty(), "waiting for running requests")
        except EngineError as error:
            self.abort(str(error))
            raise
        # An earlier update that was left open may have overwritten weights already.
        self._dirty = self._dirty or (self._update is not None and self._update.touched)
        self._update = Update(version, manifest)

    async def join(self, address: Address) -> None:
        """Meet the sender of the update. Raises TransportError."""
        self._updating()
        await self._bounded_update(self._order(Join(address)), "meeting the sender", _REPORT_SECONDS)

    async def load(self, bucket: Bucket) -> None:
        """Overwrite some of the weights. Raises EngineError, and refuses to serve, where that fails."""
        update = self._updating()
        try:
            update.arrives(bucket.tensors)
            await self._bounded_update(self._order(Load(bucket)), "loading weights", _REPORT_SECONDS)
        except EngineError as error:
            self._gate.refuse(f"its weights are incomplete ({error})")
            raise

    async def commit(self) -> int:
        """Serve the new version and return it, if every tensor arrived; else refuse and raise EngineError."""
        update = self._updating()
        try:
            update.check_complete()
            await self._bounded_update(self._order(End()), "ending the update")
            await self.clear_cache()
        except EngineError as error:
            self._gate.refuse(f"its weights are incomplete ({error})")
            raise
        self._server.manager.server_args.override("treepo", weight_version=str(update.version))
        self._version, self._update, self._dirty = update.version, None, False
        self._gate.open()
        return update.version

    def abort(self, reason: str) -> None:
        """End an update that will not be completed: serve the old version if it is whole, else refuse."""
        self._dirty = self._dirty or (self._update is not None and self._update.touched)
        self._update = None
        if self._dirty:
            self._gate.refuse(f"its weights are incomplete ({reason})")
        else:
            self._gate.open()

    async def clear_cache(self) -> None:
        """Forget every cached prefix; none may be in use."""
        await self._bounded_update(self._flush(), "flushing the prefix cache")

    async def release_memory(self) -> None:
        """Give the device's memory to others until `restore_memory`; no request may run or come meanwhile.

        The weights are kept in the host's memory. Only of an engine that shares its device.
        """
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        manager = self._server.manager
        await self._bounded_update(self._flush(), "flushing the prefix cache")
        release = manager.release_memory_occupation(ReleaseMemoryOccupationReqInput())
        await self._bounded_update(release, "releasing memory")

    async def restore_memory(self, part: Literal["weights", "cache"]) -> None:
        """Take back what `release_memory` gave away: weights first; the cache when others need less again."""
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        tags = {"weights": ["weights"], "cache": ["kv_cache", "cuda_graph"]}[part]
        resume = self._server.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
        await self._bounded_update(resume, "restoring memory")

    def close(self) -> None:
        """End SGLang's processes, and no other. May be called again."""
        self._server.close()

    async def _bounded_update(self, work: Any, what: str, more_seconds: float = 0.0) -> None:
        await self._server.bounded(work, self._config.update_seconds + more_seconds, what)

    def _updating(self) -> Update:
        if self._update is None:
            raise EngineError("no weight update has begun")
        return self._update

    async def _generate(self, request: GenerateRequest) -> GenerateOutput:
        if request.check_every and self._stop_rule is None:
            raise EngineError("check_every needs an engine with a stop rule")
        if len(request.context) + request.max_tokens > self._server.longest:
            raise EngineError(
                f"{request.max_tokens} tokens under a context of {len(request.context)} are asked for; "
                f"together they may be {self._server.longest} (the model's positions, or its KV cache of "
                f"{self._server.capacity} tokens, less what SGLang keeps free)"
            )
        sampling = {
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "stop_token_ids": sorted(self._end_tokens),
            "sampling_seed": request.seed,
            "stream_interval": request.check_every or None,
        }
        async with (
            self._gate.passage(),
            aclosing(self._answers(request.context, sampling, stream=request.check_every > 0)) as answers,
        ):
            checked = 0
            output = {}
            async for output in answers:
                tokens = output["output_ids"]
                for boundary in _boundaries(request.check_every, checked, len(tokens)):
                    if self._gate.is_shut or self._holds(request, tokens[:boundary]):
                        return self._output(output, boundary)
                    checked = boundary
            return self._output(output, len(output["output_ids"]))

    def _holds(self, request: GenerateRequest, tokens: list[int]) -> bool:
        """Whether the stop rule holds for the response with the new `tokens` at its end."""
        assert self._stop_rule is not None
        above = request.context[request.prompt_tokens :]
        return self._stop_rule(np.concatenate([above, np.asarray(tokens, dtype=np.int32)]))

    def _output(self, output: dict[str, Any], length: int) -> GenerateOutput:
        """The first `length` tokens of what SGLang sampled."""
        meta = output["meta_info"]
        tokens = np.asarray(output["output_ids"][:length], dtype=np.int32)
        scores = [score for score, _, _ in meta["output_token_logprobs"][:length]]
        log_probs = np.asarray(scores, dtype=np.float32)
        if not 0 < len(tokens) == len(log_probs):
            raise EngineError(f"SGLang returned {len(tokens)} tokens and {len(log_probs)} log-probs")
        if not np.isfinite(log_probs).all():
            raise EngineError("SGLang returned a log-prob that is not finite: the weights may have diverged")
        if meta["weight_version"] != str(self._version):
            raise EngineError(f"sampled by weights {meta['weight_version']}, not by {self._version}")
        return GenerateOutput(
            tokens=tokens,
            log_probs=log_probs,
            version=self._version,
            finish="eos" if int(tokens[-1]) in self._end_tokens else "length",
            cached_tokens=meta["cached_tokens"],
        )

    async def _score(self, tokens: np.ndarray) -> np.ndarray:
        async with (
            self._gate.passage(),
            aclosing(self._answers(tokens, {"max_new_tokens": 0}, score_input=True)) as answers,
        ):
            output = await anext(answers)
        scores = [score for score, _, _ in output["meta_info"]["input_token_logprobs"][1:]]
        return np.asarray(scores, dtype=np.float32)

    async def _show_life(self) -> None:
        manager = self._server.manager
        before = manager.last_receive_tstamp
        probe = asyncio.ensure_future(self._one_token())
        try:
            while not probe.done() and manager.last_receive_tstamp == before:
                await asyncio.wait((probe,), timeout=_LOOK_SECONDS)
            if probe.done():
                probe.result()
        finally:
            probe.cancel()

    async def _one_token(self) -> None:
        token = np.zeros(1, dtype=np.int32)  # every vocabulary has it
        async with aclosing(self._answers(token, {"max_new_tokens": 1})) as answers:
            await anext(answers)

    async def _answers(
        self,
        context: np.ndarray,
        sampling: dict[str, Any],
        *,
        stream: bool = False,
        score_input: bool = False,
    ) -> AsyncGenerator[dict[str, Any]]:
        """SGLang's answers to one request, each with all tokens so far. Left early, it ends the request."""
        from fastapi import HTTPException
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager = self._server.manager
        if context.max() >= manager.model_config.vocab_size or context.min() < 0:
            raise EngineError(
                f"tokens from {context.min()} to {context.max()} are not within the model's vocabulary of "
                f"{manager.model_config.vocab_size}"
            )
        request = GenerateReqInput(
            rid=uuid.uuid4().hex,
            input_ids=context.tolist(),
            sampling_params=sampling,
            return_logprob=True,
            logprob_start_len=0 if score_input else -1,
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
            if finish is None and not self._server.death.done():
                manager.abort_request(request.rid)

    async def _order(self, action: Action) -> None:
        """Have every rank of SGLang do something about weights. Raises what a rank failed with."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        receipts = Receipts(self._server.ranks)
        try:
            order = [("order", receipts.order(action))]
            # One for each rank: shared memory that a message names can be taken once.
            payloads: Any = [MultiprocessingSerializer.serialize(order) for _ in range(self._server.ranks)]
            request = UpdateWeightsFromTensorReqInput(
                serialized_named_tensors=payloads, load_format=LOADER, flush_cache=False
            )
            success, message = await self._server.manager.update_weights_from_tensor(request)
            if not success:
                raise EngineError(f"SGLang did not load weights: {message}")
            receipts.check()
        finally:
            receipts.close()

    async def _flush(self) -> None:
        """Old prefixes cannot be matched any more; free their memory."""
        flushed = await self._server.manager.flush_cache(timeout_s=self._config.update_seconds)
        if not flushed.success:
            raise EngineError(f"SGLang did not flush its prefix cache: {flushed.message}")


def _boundaries(step: int, checked: int, sampled: int) -> range:
    """Multiples of `step` above `checked` and below `sampled`; none where `step` is 0."""
    return range(checked + step, sampled, step) if step else range(0)


def _end_tokens(model: Path) -> frozenset[int]:
    """The tokenizer's count too where the folder has one; an engine needs none, it speaks in ids."""
    return frozenset(load_tokenizer(model).end_tokens if has_tokenizer(model) else end_tokens(model))
