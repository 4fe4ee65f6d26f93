"""A server that answers as SGLang 0.5.16 does (/generate, /model_info, /server_info), with a `FakeEngine`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

from tests.support.fake_engine import EOS, FakeEngine
from treepo.errors import EngineError
from treepo.protocols import GenerateRequest


@dataclass
class FakeServer:
    """change: applied to each answer before it is sent. bodies: the requests so far."""

    engine: FakeEngine
    change: Callable[[dict[str, Any]], Any] = lambda answer: answer
    status: int = 200
    weight_version: str = "default"
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def start(self) -> str:
        """Listen on a free port; returns the URL."""
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "out of\nmemory"}}, status=self.status)
        sampling = body["sampling_params"]
        asked = GenerateRequest(
            context=np.array(body["input_ids"], dtype=np.int32),
            prompt_tokens=len(body["input_ids"]),
            max_tokens=sampling["max_new_tokens"],
            temperature=sampling["temperature"],
            seed=sampling["sampling_seed"],
        )
        try:
            output = await self.engine.generate(asked)
        except EngineError as error:
            return web.json_response({"error": {"message": str(error)}}, status=503)
        ended = output.finish == "eos"
        tokens, log_probs = output.tokens.tolist(), output.log_probs.tolist()
        answer = {
            "text": "",
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "stop", "matched": EOS}
                if ended
                else {"type": "length", "length": 1},
                "prompt_tokens": len(body["input_ids"]),
                "weight_version": self.weight_version,
                "output_token_logprobs": [
                    [log_prob, token, None] for log_prob, token in zip(log_probs, tokens, strict=True)
                ],
                "completion_tokens": len(tokens),
                "cached_tokens": output.cached_tokens,
            },
        }
        return web.json_response(self.change(answer))

    async def _model_info(self, _request: web.Request) -> web.Response:
        return web.json_response({"model_path": "/nowhere/model", "tokenizer_path": "/nowhere/model"})

    async def _server_info(self, _request: web.Request) -> web.Response:
        return web.json_response({"max_total_num_tokens": 5000, "max_req_input_len": 900})
