"""The simulated engine against the real one: the same driver, the same lengths, the same events.

Seconds are compared by benchmarks/plan.py; what is compared here hardly depends on how fast anything is.
"""

from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from treepo.config.sampling import SamplingConfig
from treepo.planning.simulation.lengths import random_prompts
from treepo.planning.simulation.rates import Line, Prefill
from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.protocols import Engine, GenerateOutput, GenerateRequest
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

    def decode(self, requests: int) -> list[Line]:
        return [Line(0.008 + 1e-4 * requests, 1e-7)]

    def prefill(self, batch: Prefill) -> float:
        return 0.01 + 2e-4 * batch.requests + 1e-5 * batch.new


@dataclass
class Answer:
    tokens: int
    finish: Any
    prefilled: int


class Recording:
    """An engine whose answers' lengths are written down by the requests' seeds."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.first: dict[int, Answer] = {}  # below the prompt
        self.others: dict[int, Answer] = {}

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        output = await self.engine.generate(request)
        answer = Answer(len(output.tokens), output.finish, len(request.context) - output.cached_tokens)
        below_prompt = len(request.context) == request.prompt_tokens
        (self.first if below_prompt else self.others)[request.seed] = answer
        return output


class Replaying:
    """An engine whose answers are as long as those that were recorded, and end in the same way."""

    def __init__(self, engine: Engine, recorded: Recording) -> None:
        self._engine, self._answers = engine, recorded.first | recorded.others

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        answer = self._answers[request.seed]
        output = await self._engine.generate(replace(request, max_tokens=answer.tokens))
        return replace(output, finish=answer.finish)


async def sample(engine: Engine) -> list[list[tuple[int, int]]]:
    """Shapes of the trees, in the order of prompts."""
    driver = TreeDriver([engine], SAMPLING, lambda _: "", seed=0, kv_tokens=50_000)
    async with aclosing(driver.sample(random_prompts(PROMPTS, PROMPT_TOKENS, 120), step=0)) as results:
        trees = [tree async for tree in results if isinstance(tree, Tree)]
    assert len(trees) == PROMPTS
    trees.sort(key=lambda tree: int(tree.prompt_id))
    return [[(segment.parent, len(segment.tokens)) for segment in tree.segments] for tree in trees]


def records(real: "RealEngine") -> int:
    """One for so many decoding steps as SGLang logs together."""
    (state,) = real.run(real.engine._sglang.manager.get_internal_state())
    return sum(map(len, state["step_time_dict"].values()))


def steps_to_record(real: "RealEngine") -> int:
    """Decode step by step until the next record."""
    before, steps = records(real), 0
    while records(real) == before:
        real.generate([5, 6, 7], max_tokens=2, seed=steps)  # the first token comes of the prefill
        steps += 1
    return steps


def test_the_simulation_has_the_real_engines_events(real_engine: "RealEngine") -> None:
    real_engine.stop_rule.holds = lambda _: False
    real_engine.run(real_engine.engine.clear_cache())
    recording = Recording(real_engine.engine)
    steps_to_record(real_engine)
    before = records(real_engine)
    shapes = real_engine.run(sample(recording))
    left = steps_to_record(real_engine)
    steps = (records(real_engine) - before) * STEPS_PER_RECORD - left

    simulated = SimulatedEngine(StatedRates(), kv_tokens=50_000)
    again = Recording(Replaying(simulated, recording))
    assert run_virtually(sample(again)) == shapes
    answers = recording.first | recording.others
    counts = simulated.counts
    assert counts.decoded_tokens == sum(answer.tokens for answer in answers.values())
    # Below a segment only its last token is computed; of prompts it depends on who came first.
    assert {seed: answer.prefilled for seed, answer in again.others.items()} == {
        seed: answer.prefilled for seed, answer in recording.others.items()
    }
    for one in (recording, again):
        computed = sum(answer.prefilled for answer in one.first.values())
        assert PROMPTS * PROMPT_TOKENS <= computed <= len(one.first) * PROMPT_TOKENS
    # Steps that pass while the driver thinks are the machine's, and a few of a round's 32.
    assert counts.steps == pytest.approx(steps, rel=0.15)
    mean_batch = (counts.decoded_tokens - len(answers)) / steps
    assert counts.mean_batch == pytest.approx(mean_batch, rel=0.15)
