"""The watchdog warns when no engine answers, with each engine's status and unanswered requests."""

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from tests.support.sampling_policies import sampling
from treepo.data.prompts import Prompt
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.driver import TreeDriver
from treepo.rollout.watchdog import watched


@dataclass
class SilentEngine(FakeEngine):
    name: str = ""
    status: str = "serving"

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        await asyncio.Event().wait()
        return await super().generate(request)


def stall(engines: list[SilentEngine], caplog: pytest.LogCaptureFixture) -> str:
    """Sample one prompt on engines that never answer, until the watchdog warns."""
    driver = TreeDriver(engines, sampling(initial_branching=2), decode, seed=7)
    prompt = Prompt("train:0", prompt_tokens(0), "", "", "")

    async def scenario() -> None:
        async with watched(driver, engines, 0.05), aclosing(driver.sample([prompt], 0)) as results:
            tree = asyncio.ensure_future(anext(results))
            while not caplog.messages:
                await asyncio.sleep(0.005)
            tree.cancel()
            await asyncio.wait((tree,))

    with caplog.at_level(logging.WARNING):
        run_virtually(scenario())
    return caplog.messages[0]


def test_a_stall_names_each_engines_status_and_its_oldest_request(caplog: pytest.LogCaptureFixture) -> None:
    engines = [SilentEngine(name="engine 0"), SilentEngine(name="engine 1", status="down: out of memory")]
    assert stall(engines, caplog) == (
        "nothing was answered for 0.05 s: engine 0 is serving with 2 unanswered requests, the oldest 0 "
        "s old: request 0 of prompt train:0; engine 1 is down: out of memory with no unanswered requests"
    )
