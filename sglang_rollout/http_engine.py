"""An engine that talks to a running SGLang server over HTTP: tokens in, tokens out.

The server may be of this SGLang version or a near one, with or without a tokenizer; it is only queried, never
changed. A request of many segments is sent segment by segment, so that the driver's stop rules see each
boundary; the server's prefix cache makes the repeated context cheap. A failure is an EngineError, and the
driver tries again.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import numpy as np

from sglang_rollout.sampling_parameters import sampling_parameters
from treepo.errors import EngineError, shown
from treepo.protocols import GenerateOutput, GenerateRequest

_CONNECT_SECONDS = 10.0
_INFO_SECONDS = 60.0
_SHOWN = 200  # bytes of the server's answer that an error quotes
_MOST_BYTES = 256 << 20  # of an answer; one of a million tokens has about 60 MiB


class ServerEngine:
    """Implements `treepo.protocols.Engine`. A context manager, to be used on one event loop.

    end_tokens: ids that end a sequence. boundaries: whether any stop rule looks at segment boundaries; if
    not, a request is never divided.
    """

    def __init__(
        self, url: str, end_tokens: tuple[int, ...], request_seconds: float, *, boundaries: bool
    ) -> None:
        self.name = self._url = url.rstrip("/")
        self.status = "serving"  # as far as is known: nothing watches the server
        self._end_tokens = end_tokens
        self._boundaries = boundaries
        self._timeout = aiohttp.ClientTimeout(total=request_seconds, connect=_CONNECT_SECONDS)
        self._weights: object = None  # the weight version of the first answer

    async def __aenter__(self) -> Self:
        # The driver bounds what is in flight.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Sample, at most up to the request's next boundary. Raises EngineError."""
        assert request.routes_from is None, "only training asks for routes"
        wanted = request.max_tokens
        if self._boundaries and request.check_every:
            wanted = min(wanted, request.check_every)
        body = {
            "input_ids": request.context.tolist(),
            "sampling_params": sampling_parameters(request)
            | {"max_new_tokens": wanted, "stop_token_ids": list(self._end_tokens)},
            "return_logprob": True,
            "logprob_start_len": -1,
        }
        answer = await _answer(
            self._session.post(f"{self._url}/generate", json=body, timeout=self._timeout), self._url
        )
        return self._output(answer, wanted)

    def _output(self, answer: Any, wanted: int) -> GenerateOutput:
        try:
            meta = answer["meta_info"]
            finish = meta["finish_reason"]["type"]
            sampled = meta["output_token_logprobs"]
            tokens = np.array([_of_type(token, int) for _, token, *_ in sampled], dtype=np.int32)
            log_probs = np.array([_of_type(each, int, float) for each, *_ in sampled], dtype=np.float32)
            weights, cached = meta.get("weight_version"), int(meta["cached_tokens"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineError(f"{self._url}: not an answer of SGLang's /generate: {error!r}") from error
        if finish == "abort":
            raise EngineError(
                f"{self._url}: the server ended a request: {meta['finish_reason'].get('message')}"
            )
        if not np.isfinite(log_probs).all():
            raise EngineError(f"{self._url}: a log-prob is not finite: the weights may have diverged")
        self._weights = self._weights or weights
        if weights != self._weights:
            raise EngineError(
                f"{self._url}: its weights changed from version {self._weights} to {weights} during sampling"
            )
        ended = len(tokens) > 0 and int(tokens[-1]) in self._end_tokens
        if not ended and len(tokens) < wanted:
            raise EngineError(
                f"{self._url}: the server stopped after {len(tokens)} of {wanted} tokens ({finish}), and not "
                f"at an end token of {list(self._end_tokens)}"
            )
        return GenerateOutput(
            tokens=tokens,
            log_probs=log_probs,
            version=_version(weights),
            finish="eos" if ended else "length",
            cached_tokens=cached,
        )


def _of_type(value: object, *types: type) -> object:
    """The value. Raises TypeError: numpy would take lists, texts and truth values too."""
    if type(value) not in types:
        raise TypeError(f"{shown(value)} is no number")
    return value


def _version(weights: object) -> int:
    """The server's weight version; 0 if it is a name, or more than a tree can keep."""
    text = str(weights)
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


@dataclass(frozen=True, slots=True)
class ServerPool:
    """A running server as a `treepo.protocols.EnginePool` of one engine."""

    engines: tuple[ServerEngine]
    kv_tokens: tuple[int] | None


@asynccontextmanager
async def server_session(engine: ServerEngine, kv_tokens: int | None) -> AsyncIterator[ServerPool]:
    """Connect to the server while the body runs. kv_tokens: of its KV cache; None if it reports none."""
    async with engine:
        yield ServerPool((engine,), None if kv_tokens is None else (kv_tokens,))


async def server_facts(url: str) -> dict[str, Any]:
    """The server's answers to /model_info and /server_info, in one dictionary. Raises EngineError."""
    timeout = aiohttp.ClientTimeout(total=_INFO_SECONDS, connect=_CONNECT_SECONDS)
    facts: dict[str, Any] = {}
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for page in ("model_info", "server_info"):
            answer = await _answer(session.get(f"{url.rstrip('/')}/{page}"), url)
            if not isinstance(answer, dict):
                raise EngineError(f"{url}: /{page} is not a JSON object: this is not an SGLang server")
            facts |= answer
    return facts


async def _answer(response: Any, url: str) -> Any:
    """The JSON of a response. Raises EngineError."""
    try:
        async with response as reply:
            if reply.status != 200:
                text = " ".join((await reply.content.read(_SHOWN)).decode(errors="replace").split())
                raise EngineError(f"{url}: {reply.status} {reply.reason}: {text}")
            return json.loads(await _content(reply, url))
    except TimeoutError as error:
        raise EngineError(f"{url}: no answer in time") from error
    except (aiohttp.ClientError, ValueError, RecursionError) as error:
        raise EngineError(f"{url}: {error}") from error


async def _content(reply: aiohttp.ClientResponse, url: str) -> bytes:
    content = bytearray()
    async for chunk in reply.content.iter_any():
        content += chunk
        if len(content) > _MOST_BYTES:
            raise EngineError(f"{url}: an answer of more than {_MOST_BYTES >> 20} MiB")
    return bytes(content)
