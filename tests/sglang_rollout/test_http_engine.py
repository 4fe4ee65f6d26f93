"""A running server as an engine: the same trees as from a local engine, and a plain error for every
failure.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sglang_rollout import http_engine
from sglang_rollout.http_engine import ServerEngine, server_facts
from tests.support.fake_engine import EOS, FakeEngine, decode, prompt_tokens
from tests.support.sglang_http import FakeServer
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.protocols import GenerateOutput, GenerateRequest, Sampler
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.tree import Tree, to_json


def request(max_tokens: int = 6, check_every: int = 0) -> GenerateRequest:
    return GenerateRequest(prompt_tokens(0), 5, max_tokens, 0.7, seed=3, check_every=check_every)


def generate(server: FakeServer, asked: GenerateRequest, *, boundaries: bool = True) -> GenerateOutput:
    async def run() -> GenerateOutput:
        url = await server.start()
        try:
            async with ServerEngine(url, (EOS,), 5.0, boundaries=boundaries) as engine:
                return await engine.generate(asked)
        finally:
            await server.close()

    return asyncio.run(run())


def test_an_answer_is_the_engines_own() -> None:
    server = FakeServer(FakeEngine(end=0.2), weight_version="12")
    output = generate(server, request())
    expected = FakeEngine(end=0.2).answer(request())
    assert output.tokens.tolist() == expected.tokens.tolist()
    assert output.log_probs.tolist() == expected.log_probs.tolist()
    assert (output.finish, output.version, output.tokens.dtype) == (expected.finish, 12, np.int32)
    (body,) = server.bodies
    assert body["sampling_params"]["stop_token_ids"] == [EOS]
    assert body["return_logprob"] is True
    assert "text" not in body, "no tokenizer is assumed"


@pytest.mark.parametrize(("boundaries", "asked"), [(True, 4), (False, 12)])
def test_a_long_request_is_divided_if_a_stop_rule_looks_at_its_boundaries(
    boundaries: bool, asked: int
) -> None:
    output = generate(FakeServer(FakeEngine()), request(12, check_every=4), boundaries=boundaries)
    assert (len(output.tokens), output.finish) == (asked, "length")


async def sample(engine: Sampler, config: SamplingConfig) -> list[bytes]:
    prompts = [Prompt(f"p:{index}", prompt_tokens(index), "", "", "") for index in range(6)]
    driver = TreeDriver([engine], config, decode, seed=0)
    trees = [result async for result in driver.sample(prompts, step=0)]
    assert all(isinstance(tree, Tree) for tree in trees)
    return sorted(to_json(tree) for tree in trees if isinstance(tree, Tree))


@pytest.mark.parametrize("mode", ["tree", "sequential"])
def test_trees_are_those_of_a_local_engine_that_is_asked_segment_by_segment(mode: str) -> None:
    config = SamplingConfig.model_validate(
        {"mode": mode, "segment_tokens": 4, "max_depth": 5, "max_response_tokens": 20, "width": 6}
    )

    async def over_http() -> list[bytes]:
        server = FakeServer(FakeEngine(end=0.03, box=0.03), weight_version="0")
        url = await server.start()
        try:
            async with ServerEngine(url, (EOS,), 5.0, boundaries=True) as engine:
                return await sample(engine, config)
        finally:
            await server.close()

    class Divided(FakeEngine):
        async def generate(self, request: GenerateRequest) -> GenerateOutput:
            most = request.check_every or request.max_tokens
            return self.answer(replace(request, max_tokens=min(request.max_tokens, most)))

    trees = asyncio.run(over_http())
    assert len(trees) == 6
    assert trees == asyncio.run(sample(Divided(end=0.03, box=0.03), config))


def _without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    def change(answer: dict[str, Any]) -> Any:
        for key in keys:
            answer["meta_info"].pop(key)
        return answer

    return change


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda answer: answer | {"meta_info": answer["meta_info"] | changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("output_token_logprobs"), "not an answer of SGLang's /generate"),
        (lambda _answer: ["?"], "not an answer of SGLang's /generate"),
        (_with(finish_reason={"type": "abort", "message": "full"}), "ended a request: full"),
        (_with(output_token_logprobs=[[float("nan"), 5, None]]), "not finite"),
        (_with(output_token_logprobs=[[-1.0, 5, None]]), "stopped after 1"),
        (_with(output_token_logprobs=[]), "stopped after 0"),
        (_with(output_token_logprobs=[[-1.0, 10**30, None]]), "not an answer of SGLang's /generate"),
        (_with(output_token_logprobs=[[-1.0, [5, 6], None]]), "not an answer of SGLang's /generate"),
        (_with(output_token_logprobs=[[-1.0, True, None]]), "not an answer of SGLang's /generate"),
        (_with(output_token_logprobs=[["-1.0", 5, None]]), "not an answer of SGLang's /generate"),
        (_with(cached_tokens=1e999), "not an answer of SGLang's /generate"),
    ],
)
def test_the_error_of_an_unusable_answer_says_why(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        generate(FakeServer(FakeEngine(), change=change), request())


@pytest.mark.parametrize("version", ["9" * 30, "²", 10**30, [3], {"a": 1}])
def test_a_weight_version_that_no_tree_can_keep_is_0(version: object) -> None:
    answer = generate(FakeServer(FakeEngine(), change=_with(weight_version=version)), request())
    assert answer.version == 0


@pytest.mark.parametrize(
    ("body", "message"), [(b"[" * 100_000, "recursion"), (b"{" + b" " * 2000, "an answer of more than 0 MiB")]
)
def test_an_answer_that_is_too_deep_or_too_long_is_an_error(
    body: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_engine, "_MOST_BYTES", 200_000 if body.startswith(b"[") else 1000)

    async def run() -> None:
        async def answer(_: web.Request) -> web.Response:
            return web.Response(body=body)

        app = web.Application()
        app.router.add_get("/model_info", answer)
        server = TestServer(app)
        await server.start_server()
        try:
            await http_engine.server_facts(str(server.make_url("/")))
        finally:
            await server.close()

    with pytest.raises(EngineError, match=message):
        asyncio.run(run())


def test_a_server_that_refuses_is_quoted_in_one_line() -> None:
    with pytest.raises(EngineError, match=r"500 Internal Server Error: .*out of") as error:
        generate(FakeServer(FakeEngine(), status=500), request())
    assert "\n" not in str(error.value)


def test_weights_that_change_during_sampling_are_an_error() -> None:
    async def run() -> None:
        server = FakeServer(FakeEngine(), weight_version="1")
        url = await server.start()
        try:
            async with ServerEngine(url, (EOS,), 5.0, boundaries=True) as engine:
                await engine.generate(request())
                server.weight_version = "2"
                await engine.generate(request())
        finally:
            await server.close()

    with pytest.raises(EngineError, match="weights changed from version 1 to 2"):
        asyncio.run(run())


def test_a_deadline_and_a_dead_server_are_errors_that_the_driver_counts() -> None:
    class Slow(FakeEngine):
        async def generate(self, request: GenerateRequest) -> GenerateOutput:
            await asyncio.Event().wait()
            raise AssertionError(request)

    async def run() -> list[FailedTree]:
        server = FakeServer(Slow())
        url = await server.start()
        config = SamplingConfig(width=2, attempts=2, retry_seconds=0)
        prompt = Prompt("p:0", prompt_tokens(0), "", "", "")
        failures = []
        try:
            async with ServerEngine(url, (EOS,), 0.2, boundaries=True) as engine:
                for _ in range(2):
                    driver = TreeDriver([engine], config, decode, seed=0)
                    failures += [result async for result in driver.sample([prompt], step=0)]
                    assert driver.stats.failed_requests >= 2
                    await server.close()
        finally:
            await server.close()
        return failures

    late, dead = asyncio.run(run())
    assert "no answer in time" in late.reason
    assert "attempt 2 of 2" in dead.reason


def test_a_server_s_facts_are_read_and_a_missing_server_is_an_error() -> None:
    async def run() -> dict[str, Any]:
        server = FakeServer(FakeEngine())
        url = await server.start()
        try:
            return await server_facts(url + "/")
        finally:
            await server.close()

    assert asyncio.run(run())["max_total_num_tokens"] == 5000
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9: "):
        asyncio.run(server_facts("http://127.0.0.1:9"))
