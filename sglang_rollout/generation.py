"""Samples the tokens of one request with SGLang, up to a boundary where the stop rule holds."""

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sglang_rollout.requests import SGLangRequests, is_interrupted
from sglang_rollout.routes import RouteFormat
from sglang_rollout.sampling_parameters import sampling_parameters
from treepo.data.tokenizer import end_tokens, has_tokenizer, load_tokenizer
from treepo.errors import EngineError
from treepo.protocols import GenerateOutput, GenerateRequest

StopRule = Callable[[np.ndarray], bool]
"""Whether a response (int32 [T], prompt excluded) needs no further tokens."""


class Generation:
    """stop_rule: called at the boundaries of `GenerateRequest.check_every`. end_tokens: end an answer.
    routes: of the model, if requests may ask for routes.
    """

    def __init__(
        self,
        requests: SGLangRequests,
        stop_rule: StopRule | None,
        end_tokens: frozenset[int],
        routes: RouteFormat | None,
    ) -> None:
        self._requests = requests
        self._stop_rule = stop_rule
        self._end_tokens = end_tokens
        self._routes = routes

    @property
    def checks(self) -> bool:
        """Whether requests may have `check_every`."""
        return self._stop_rule is not None

    async def sample(self, request: GenerateRequest, version: int) -> GenerateOutput | None:
        """Sample with the weights of `version`; None if interrupted before the first token, or where the
        routes that it asks for are lost.
        """
        sampling = sampling_parameters(request) | {
            "stop_token_ids": sorted(self._end_tokens),
            "stream_interval": request.check_every or None,
        }
        work = self._requests.answers(
            request.context,
            sampling,
            version,
            stream=request.check_every > 0,
            interruptible=True,
            routes_from=request.routes_from,
        )
        checked, stopped, answer, interrupted = 0, 0, {}, False
        async with aclosing(work) as answers:
            async for answer in answers:
                tokens = answer["output_ids"]
                interrupted = is_interrupted(answer)
                if stopped:
                    continue
                for boundary in _boundaries(request.check_every, checked, len(tokens), interrupted):
                    if self._should_stop(request, tokens[:boundary]):
                        stopped = boundary
                        break
                    checked = boundary
                if stopped and request.routes_from is None:
                    break
                if stopped:  # SGLang gives the routes with a request's last answer, a step from here
                    self._requests.end(answer)
        length = stopped or len(answer["output_ids"])
        # A request that is interrupted while it waits in SGLang's queue has no routes. If it has tokens, it
        # was retracted before; they are sampled again.
        if interrupted and (not length or not self._has_routes(request, answer)):
            return None
        finish = "interrupted" if interrupted and not stopped and length < request.max_tokens else "length"
        return self._output(request, answer, length, finish, version)

    @staticmethod
    def _has_routes(request: GenerateRequest, answer: dict[str, Any]) -> bool:
        """Whether the answer has the routes that were asked for, if any."""
        return request.routes_from is None or "routed_experts" in answer["meta_info"]

    def _should_stop(self, request: GenerateRequest, tokens: list[int]) -> bool:
        """Whether the stop rule holds for the response that ends with the new `tokens`."""
        assert self._stop_rule is not None
        above = request.context[request.prompt_tokens :]
        return self._stop_rule(np.concatenate([above, np.asarray(tokens, dtype=np.int32)]))

    def _output(
        self,
        request: GenerateRequest,
        answer: dict[str, Any],
        length: int,
        finish: Literal["length", "interrupted"],
        version: int,
    ) -> GenerateOutput:
        """The first `length` tokens that SGLang sampled. finish: if the last of them is not an end token."""
        meta = answer["meta_info"]
        tokens = np.asarray(answer["output_ids"][:length], dtype=np.int32)
        sampled = meta["output_token_logprobs"][:length]
        log_probs = np.asarray([log_prob for log_prob, _, _ in sampled], dtype=np.float32)
        if not 0 < len(tokens) == len(log_probs):
            raise EngineError(f"SGLang returned {len(tokens)} tokens and {len(log_probs)} log-probs")
        if not np.isfinite(log_probs).all():
            raise EngineError("SGLang returned a log-prob that is not finite: the weights may have diverged")
        if meta["weight_version"] != str(version):
            raise EngineError(
                f"SGLang sampled with weights of version {meta['weight_version']}, not {version}"
            )
        return GenerateOutput(
            tokens=tokens,
            log_probs=log_probs,
            version=version,
            finish="eos" if int(tokens[-1]) in self._end_tokens else finish,
            cached_tokens=meta["cached_tokens"],
            routes=self._read_routes(request, answer, length),
        )

    def _read_routes(
        self, request: GenerateRequest, answer: dict[str, Any], length: int
    ) -> np.ndarray | None:
        """The routes that the request asks for; `length` of the sampled tokens are used."""
        if request.routes_from is None:
            return None
        assert self._routes is not None
        before = len(request.context) - request.routes_from
        routes = self._routes.read(
            answer["meta_info"].get("routed_experts"), before + len(answer["output_ids"]) - 1
        )
        return routes[: before + length - 1]


def all_end_tokens(model: Path) -> frozenset[int]:
    """End tokens of the model and, if the folder has one, of the tokenizer. An engine needs no tokenizer."""
    return frozenset(load_tokenizer(model).end_tokens if has_tokenizer(model) else end_tokens(model))


def _boundaries(step: int, checked: int, sampled: int, is_last: bool) -> range:
    """Multiples of `step` above `checked` and below `sampled`; none if `step` is 0.

    is_last: no token follows, so a boundary at `sampled` itself counts too.
    """
    return range(checked + step, sampled + is_last, step) if step else range(0)
