"""A real SGLang engine behind the project's small protocols.

Plain asyncio: construct it anywhere, use it on one running loop. Log-probs are those of the distribution
that was sampled from (temperature applied). Every request's radix-cache key carries the weight version, so
a prefix computed with other weights can never be matched. An update is a transaction: after `begin` nothing
is served until `commit` has verified what arrived; where it did not verify, requests are refused until a
later update does.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sglang_rollout.end_tokens import end_tokens
from sglang_rollout.server import Server
from sglang_rollout.weights import check_names, check_shapes, checkpoint_shapes, shared_payload
from treepo.config.engine import EngineConfig
from treepo.errors import EngineError
from treepo.protocols import Bucket, GenerateOutput, GenerateRequest

StopRule = Callable[[np.ndarray], bool]
"""Whether a response (int32 [T], prompt excluded) needs no further tokens."""


class SGLangEngine:
    """Implements `treepo.protocols.Engine` and `WeightSink`.

    model: a Hugging Face folder. dtype: of the weights and the KV cache ("float32", "bfloat16").
    stop_rule: what `GenerateRequest.check_every` asks at its boundaries.
    Raises EngineError or ModelError where SGLang does not start on the folder.
    """

    def __init__(
        self, model: Path, dtype: str, config: EngineConfig, *, seed: int, stop_rule: StopRule | None = None
    ) -> None:
        self._config = config
        self._stop_rule = stop_rule
        self._end_tokens = end_tokens(model)
        self._shapes = checkpoint_shapes(model)
        self._server = Server(model, dtype, config, seed)
        self._gate = _Gate()
        self._version = 0
        self._next_version: int | None = None
        self._arrived: list[str] = []

    @property
    def version(self) -> int:
        """The committed weight version; the model folder's own weights are 0."""
        return self._version

    def capacity(self) -> int:
        """Tokens in the KV cache, shared by all live prefixes."""
        return self._server.capacity

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Sample. Waits while an update is under way. Raises EngineError, naming the reason."""
        return await self._bounded(self._generate(request), self._config.request_seconds, "a request")

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """Log-prob of each token but the first given those before it, at temperature 1: float32 [T-1]."""
        return await self._bounded(self._score(tokens), self._config.request_seconds, "a scoring request")

    async def begin(self, version: int) -> None:
        """Stop serving: later requests wait, running ones finish. Begins anew where an update was left open."""
        self._gate.shut()
        self._next_version = version
        self._arrived = []
        await self._bounded(self._gate.empty(), self._config.update_seconds, "waiting for running requests")

    async def load(self, bucket: Bucket) -> None:
        """Overwrite some of the weights. Raises EngineError, and refuses to serve, where SGLang does not."""
        self._assert_updating()
        try:
            check_shapes(bucket, self._shapes)
            await self._bounded(self._load(bucket), self._config.update_seconds, "loading weights")
        except EngineError as error:
            self._gate.refuse(f"its weights are incomplete ({error})")
            raise
        self._arrived += bucket.names

    async def commit(self, names: Sequence[str]) -> int:
        """Serve the new version if exactly `names` arrived; refuse to serve, and raise EngineError, if not."""
        version = self._assert_updating()
        try:
            check_names(self._arrived, names)
            await self._bounded(self._flush(), self._config.update_seconds, "flushing the prefix cache")
        except EngineError as error:
            self._gate.refuse(f"its weights are incomplete ({error})")
            raise
        self._server.manager.server_args.override("treepo.commit", weight_version=str(version))
        self._version, self._next_version = version, None
        self._gate.open()
        return version

    def close(self) -> None:
        """End SGLang's processes, and no other. May be called again."""
        self._server.close()

    async def _generate(self, request: GenerateRequest) -> GenerateOutput:
        sampling = {
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "stop_token_ids": sorted(self._end_tokens),
            "sampling_seed": request.seed,
        }
        if request.check_every:
            if self._stop_rule is None:
                raise EngineError("check_every needs an engine with a stop rule")
            sampling["stream_interval"] = request.check_every
        checked, output = 0, {}
        async with (
            self._gate.passage(),
            aclosing(self._answers(request.context, sampling, stream=bool(request.check_every))) as answers,
        ):
            version = self._version
            async for output in answers:
                stop, checked = self._stop_boundary(request, output["output_ids"], checked)
                if stop:
                    return self._output(output, version, stop)
        return self._output(output, version, len(output["output_ids"]))

    def _stop_boundary(self, request: GenerateRequest, tokens: list[int], checked: int) -> tuple[int, int]:
        """How many of the new tokens to keep because the stop rule holds there (0: it does not hold yet),
        and how many have been checked.
        """
        if not request.check_every:
            return 0, 0
        assert self._stop_rule is not None
        above = request.context[request.prompt_tokens :]
        for boundary in range(checked + request.check_every, len(tokens), request.check_every):
            checked = boundary
            if self._stop_rule(np.concatenate([above, np.asarray(tokens[:boundary], dtype=np.int32)])):
                return boundary, checked
        return 0, checked

    def _output(self, output: dict[str, Any], version: int, length: int) -> GenerateOutput:
        meta = output["meta_info"]
        tokens = np.asarray(output["output_ids"][:length], dtype=np.int32)
        log_probs = np.asarray(
            [entry[0] for entry in meta["output_token_logprobs"][:length]], dtype=np.float32
        )
        if not 0 < len(tokens) == len(log_probs):
            raise EngineError(f"SGLang returned {len(tokens)} tokens and {len(log_probs)} log-probs")
        if not np.isfinite(log_probs).all():
            raise EngineError("SGLang returned a log-prob that is not finite; the weights may have diverged")
        if meta["weight_version"] != str(version):
            raise EngineError(f"sampled by weights {meta['weight_version']}, asked of version {version}")
        return GenerateOutput(
            tokens=tokens,
            log_probs=log_probs,
            version=version,
            finish="eos" if int(tokens[-1]) in self._end_tokens else "length",
            cached_tokens=meta["cached_tokens"],
        )

    async def _score(self, tokens: np.ndarray) -> np.ndarray:
        async with (
            self._gate.passage(),
            aclosing(self._answers(tokens, {"max_new_tokens": 0}, stream=False, score=True)) as answers,
        ):
            output = await anext(answers)
        return np.asarray(
            [entry[0] for entry in output["meta_info"]["input_token_logprobs"][1:]], dtype=np.float32
        )

    async def _answers(
        self, context: np.ndarray, sampling: dict[str, Any], *, stream: bool, score: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """SGLang's answers to one request, the last one complete. Left early, it ends the request."""
        from fastapi import HTTPException
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager = self._server.manager
        request = GenerateReqInput(
            rid=uuid.uuid4().hex,
            input_ids=context.tolist(),
            sampling_params=sampling,
            return_logprob=True,
            logprob_start_len=0 if score else -1,
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
            if finish is None:
                manager.abort_request(request.rid)

    async def _load(self, bucket: Bucket) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        update = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[MultiprocessingSerializer.serialize(shared_payload(bucket))],
            load_format="flattened_bucket",
            flush_cache=False,
        )
        success, message = await self._server.manager.update_weights_from_tensor(update)
        if not success:
            raise EngineError(f"SGLang did not load weights: {message}")

    async def _flush(self) -> None:
        """Old prefixes cannot be matched any more; free their memory."""
        flushed = await self._server.manager.flush_cache(timeout_s=self._config.update_seconds)
        if not flushed.success:
            raise EngineError(f"SGLang did not flush its prefix cache: {flushed.message}")

    def _assert_updating(self) -> int:
        if self._next_version is None:
            raise EngineError("no weight update has begun")
        return self._next_version

    async def _bounded[T](self, work: Coroutine[Any, Any, T], seconds: float, what: str) -> T:
        """`work`'s result. Raises EngineError at the deadline and as soon as SGLang has died."""
        death = self._server.death
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, death), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if task.done():
            return task.result()
        if death.done():
            raise EngineError(death.result())
        raise EngineError(f"{what} took longer than {seconds:g} s")


class _Gate:
    """Requests pass it while it is open, wait while it is shut, and fail while it refuses."""

    def __init__(self) -> None:
        self._refusal: str | None = None
        self._decided = asyncio.Event()  # open or refusing
        self._decided.set()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def open(self) -> None:
        self._refusal = None
        self._decided.set()

    def shut(self) -> None:
        self._decided.clear()

    def refuse(self, reason: str) -> None:
        self._refusal = reason
        self._decided.set()

    async def empty(self) -> None:
        """Until no request is inside."""
        await self._empty.wait()

    @asynccontextmanager
    async def passage(self) -> AsyncIterator[None]:
        while not self._decided.is_set():
            await self._decided.wait()
        if self._refusal is not None:
            raise EngineError(f"the engine refuses to serve: {self._refusal}")
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()
