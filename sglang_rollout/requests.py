"""Requests to SGLang's tokenizer manager, which can be interrupted while SGLang computes them."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np

from sglang_rollout.processes import SGLangProcesses
from treepo.errors import EngineError

_INTERRUPTIBLE = "treepo-"  # SGLang aborts all requests whose names begin with the given text


class SGLangRequests:
    """Sends requests and reads their answers. adapter: SGLang's id of the adapter that samples; None if the
    model's own weights do.
    """

    def __init__(self, sglang: SGLangProcesses) -> None:
        self._sglang = sglang
        self.adapter: str | None = None
        self._running: set[str] = set()
        self._interrupted: set[str] = set()

    def interrupt(self) -> None:
        """End every interruptible request that SGLang has, after the decoding step that it is in."""
        from sglang.srt.managers.io_struct import AbortReq

        if self._running and not self._sglang.death.done():
            self._interrupted |= self._running
            self._sglang.manager._dispatch_to_scheduler(AbortReq(rid=_INTERRUPTIBLE))

    def end(self, answer: dict[str, Any]) -> None:
        """End the interruptible request of an answer after the decoding step that it is in.

        Its last answer follows, as if it had been interrupted, or the usual one if it ends by itself first.
        """
        name = answer["meta_info"]["id"]
        self._interrupted.add(name)
        self._sglang.manager.abort_request(name)

    async def log_probs(self, tokens: np.ndarray, version: int) -> np.ndarray:
        """Log-probs of all tokens but the first, given those before them, at temperature 1: float32 [T-1]."""
        async with aclosing(self.answers(tokens, {"max_new_tokens": 0}, version, of_context=True)) as answers:
            answer = await anext(answers)
        computed = answer["meta_info"]["input_token_logprobs"][1:]
        return np.asarray([log_prob for log_prob, _, _ in computed], dtype=np.float32)

    async def read(self, prefix: np.ndarray, version: int) -> int | None:
        """Compute a prefix (int32 [T]) into the cache; returns how many of its tokens were not there.

        None if it was interrupted.
        """
        work = self.answers(prefix, {"max_new_tokens": 0}, version, log_probs=False, interruptible=True)
        async with aclosing(work) as answers:
            answer = await anext(answers)
        return None if is_interrupted(answer) else len(prefix) - answer["meta_info"]["cached_tokens"]

    async def answers(
        self,
        context: np.ndarray,
        sampling: dict[str, Any],
        version: int,
        *,
        stream: bool = False,
        of_context: bool = False,
        log_probs: bool = True,
        interruptible: bool = False,
        routes_from: int | None = None,
    ) -> AsyncGenerator[dict[str, Any]]:
        """SGLang's answers to one request, each with all tokens so far. Closing it early ends the request.

        The last answer of a request that was interrupted has a finish reason of type "abort", and perhaps no
        token. context: int32 [T]. version: of the weights, part of the radix-cache key. of_context: whether
        log-probs of the context's tokens are computed too. routes_from: as in `GenerateRequest`; the last
        answer has them. Raises EngineError if SGLang refuses the request or ends it by itself.
        """
        from fastapi import HTTPException
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager = self._sglang.manager
        check_vocabulary(context, manager.model_config.vocab_size)
        name = f"{_INTERRUPTIBLE if interruptible else ''}{uuid.uuid4().hex}"
        request = GenerateReqInput(
            rid=name,
            input_ids=context.tolist(),
            sampling_params=sampling,
            return_logprob=log_probs,
            logprob_start_len=0 if of_context else -1,
            stream=stream,
            extra_key=f"v{version}",
            lora_id=self.adapter,
            return_routed_experts=routes_from is not None,
            routed_experts_start_len=routes_from or 0,
        )
        finish = None
        cached = 0
        if interruptible:
            self._running.add(name)
        try:
            async with aclosing(manager.generate_request(request)) as answers:
                async for answer in answers:
                    meta = answer["meta_info"]
                    finish = meta["finish_reason"]
                    if finish is not None and finish["type"] == "abort":
                        if name not in self._interrupted:
                            raise EngineError(f"SGLang ended a request: {finish.get('message')}")
                        # Of a request in its queue, SGLang returns the last token only, but all log-probs.
                        answer["output_ids"] = [
                            token for _, token, _ in meta.get("output_token_logprobs", ())
                        ]
                    cached = meta.setdefault("cached_tokens", cached)
                    yield answer
        except (ValueError, HTTPException) as error:
            raise EngineError(f"SGLang refused a request of {len(context)} tokens: {error}") from error
        finally:
            self._running.discard(name)
            self._interrupted.discard(name)
            if finish is None and not self._sglang.death.done():
                manager.abort_request(name)


def is_interrupted(answer: dict[str, Any]) -> bool:
    """Whether this is the last answer to a request that was interrupted."""
    finish = answer["meta_info"]["finish_reason"]
    return finish is not None and finish["type"] == "abort"


def check_vocabulary(context: np.ndarray, vocabulary: int) -> None:
    """Raise EngineError if a token is not in the model's vocabulary."""
    if context.max() >= vocabulary or context.min() < 0:
        raise EngineError(
            f"the context has tokens from {context.min()} to {context.max()}; the model has a vocabulary of "
            f"{vocabulary}"
        )
