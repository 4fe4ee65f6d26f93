"""The simulated engine against the real one: the same driver and the same lengths give the same events.

Seconds are compared by benchmarks/plan.py. Nothing here depends on how fast the machine is: the real engine
batches fewer requests when its driver is slow, so its steps are counted while it and the driver take turns.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from treepo.config.sampling import SamplingConfig
from treepo.planning.simulation.lengths import random_prompts
from treepo.planning.simulation.rates import Prefill
from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.protocols import GenerateOutput, GenerateRequest, Sampler
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

STEPS_PER_RECORD = 40  # SGLang's decode_log_interval
SAMPLING = SamplingConfig.model_validate({
    "segment_tokens": 32,
    "max_depth": 6,
    "width": 8,
    "max_response_tokens": 192,
    "stops": {"boxed": "off", "repetition": {"check": "off"}},
})  # fmt: skip
PROMPTS, PROMPT_TOKENS = 10, 24


class StatedRates:
    """About those of the real engine on one core that has nothing else to do."""

    latency = 0.004

    def decode(self, requests: int, kv_tokens: np.ndarray) -> np.ndarray:
        return 0.008 + 1e-4 * requests + 1e-7 * kv_tokens

    def prefill(self, batch: Prefill) -> float:
        return 0.01 + 2e-4 * batch.requests + 1e-5 * batch.new


@dataclass
class Answer:
    tokens: int
    finish: Any
    prefilled: int


class Recording:
    """An engine whose answers' lengths are recorded by their requests' seeds."""

    def __init__(self, engine: Sampler) -> None:
        self.engine = engine
        self.below_prompt: dict[int, Answer] = {}
        self.below_segment: dict[int, Answer] = {}

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        output = await self.engine.generate(request)
        answer = Answer(len(output.tokens), output.finish, len(request.context) - output.cached_tokens)
        below_prompt = len(request.context) == request.prompt_tokens
        (self.below_prompt if below_prompt else self.below_segment)[request.seed] = answer
        return output

    @property
    def answers(self) -> dict[int, Answer]:
        return self.below_prompt | self.below_segment


class Replaying:
    """An engine whose answers are as long as the recorded ones, and end in the same way."""

    def __init__(self, engine: Sampler, recorded: Recording) -> None:
        self._engine, self._answers = engine, recorded.answers

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        answer = self._answers[request.seed]
        output = await self._engine.generate(replace(request, max_tokens=answer.tokens))
        return replace(output, finish=answer.finish)


class TakingTurns:
    """An engine that computes only while the driver waits for all its answers.

    held: while its body runs, the engine accepts that many requests and computes nothing.
    """

    def __init__(self, engine: Sampler, held: Callable[[int], AbstractAsyncContextManager[Any]]) -> None:
        self._engine, self._held = engine, held
        self._asked: list[tuple[GenerateRequest, asyncio.Future[GenerateOutput]]] = []
        self._turns: asyncio.Task[None] | None = None

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        answer = asyncio.get_running_loop().create_future()
        self._asked.append((request, answer))
        if self._turns is None:
            self._turns = asyncio.create_task(self._take_turns())
        return await answer

    async def _take_turns(self) -> None:
        await nothing_to_do()
        while self._asked:
            asked, self._asked = self._asked, []
            async with self._held(len(asked)):
                work = [asyncio.create_task(self._engine.generate(request)) for request, _ in asked]
                await nothing_to_do()
            for (_, answer), output in zip(asked, await asyncio.gather(*work), strict=True):
                answer.set_result(output)
            await nothing_to_do()
        self._turns = None


async def nothing_to_do() -> None:
    """Until every task waits for something outside the loop: driver and requests hand over fewer times."""
    for _ in range(100):
        await asyncio.sleep(0)


async def sample(engine: Sampler) -> list[list[tuple[int, int]]]:
    """Shapes of the trees, in the order of prompts."""
    driver = TreeDriver([engine], SAMPLING, lambda _: "", seed=0, kv_tokens=50_000)
    async with aclosing(driver.sample(random_prompts(PROMPTS, PROMPT_TOKENS, 120), step=0)) as results:
        trees = [tree async for tree in results if isinstance(tree, Tree)]
    assert len(trees) == PROMPTS
    trees.sort(key=lambda tree: int(tree.prompt_id))
    return [[(segment.parent, len(segment.tokens)) for segment in tree.segments] for tree in trees]


def records(real: "RealEngine") -> int:
    """Each is of the decoding steps that SGLang logs together."""
    (state,) = real.run(real.engine._sglang.manager.get_internal_state())
    return sum(map(len, state["step_time_dict"].values()))


def steps_to_record(real: "RealEngine") -> int:
    """Decodes step by step until the next record."""
    before, steps = records(real), 0
    while records(real) == before:
        real.generate([5, 6, 7], max_tokens=2, seed=steps)  # the prefill makes the first token
        steps += 1
    return steps


def sampled(real: "RealEngine", engine: Sampler) -> tuple[list[list[tuple[int, int]]], int]:
    """Shapes of the trees, and decoding steps."""
    real.stop_rule.holds = lambda _: False
    real.run(real.engine.clear_cache())
    steps_to_record(real)
    before = records(real)
    shapes = real.run(sample(engine))
    left = steps_to_record(real)
    return shapes, (records(real) - before) * STEPS_PER_RECORD - left


@asynccontextmanager
async def held(real: "RealEngine", requests: int):
    """SGLang's scheduler queues `requests` and runs none of them.

    It receives in the order of sending, and answers `get_internal_state` while it is paused: the answer says
    that it has everything that was sent before.
    """
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    manager = real.engine._sglang.manager
    await manager._async_dispatch_to_scheduler(PauseGenerationReqInput(mode="in_place"))
    await manager.get_internal_state()
    yield
    while len(manager.rid_to_state) < requests:
        await asyncio.sleep(0)
    await nothing_to_do()
    await manager.get_internal_state()
    await manager._async_dispatch_to_scheduler(ContinueGenerationReqInput())


def test_the_simulation_has_the_real_engines_events(real_engine: "RealEngine") -> None:
    recording = Recording(real_engine.engine)
    shapes, steps = sampled(real_engine, recording)
    simulated = SimulatedEngine(StatedRates(), kv_tokens=50_000)
    again = Recording(Replaying(simulated, recording))
    assert run_virtually(sample(again)) == shapes
    assert simulated.counts.decoded_tokens == sum(answer.tokens for answer in recording.answers.values())
    # Below a segment only its last token is computed; below a prompt it depends on which request came first.
    assert {seed: answer.prefilled for seed, answer in again.below_segment.items()} == {
        seed: answer.prefilled for seed, answer in recording.below_segment.items()
    }
    for one in (recording, again):
        computed = sum(answer.prefilled for answer in one.below_prompt.values())
        assert PROMPTS * PROMPT_TOKENS <= computed <= len(one.below_prompt) * PROMPT_TOKENS
    # Steps in which requests are missing because the driver is slow only add to the real engine's.
    assert simulated.counts.steps <= 1.15 * steps


def test_engine_and_driver_in_turns_take_the_same_decoding_steps(real_engine: "RealEngine") -> None:
    recording = Recording(real_engine.engine)
    shapes, steps = sampled(real_engine, TakingTurns(recording, lambda requests: held(real_engine, requests)))
    simulated = SimulatedEngine(StatedRates(), kv_tokens=50_000)
    turns = TakingTurns(Replaying(simulated, recording), lambda _: nullcontext())
    assert run_virtually(sample(turns)) == shapes
    assert simulated.counts.steps == steps
    # A request's prefill makes its first token.
    decoded = sum(answer.tokens - 1 for answer in recording.answers.values())
    assert simulated.counts.request_steps == decoded
