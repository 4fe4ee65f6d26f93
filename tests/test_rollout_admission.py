"""How many trees the driver lets live at once, when it has to judge by the trees so far."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from fake_engine import FakeEngine, prompt_tokens

from sglang_rollout.driver import TreeDriver
from treepo.config.sampling import SamplingConfig
from treepo.data import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.tree import Tree

SAMPLING = SamplingConfig(segment_tokens=8, max_depth=5, width=12, max_response_tokens=40)
PROMPT_TOKENS = 5
KV_TOKENS = 2 * (PROMPT_TOKENS + 12 * 40)


@dataclass
class LiveCounter(FakeEngine):
    """Remembers, for every request, how many prompts had one running."""

    live: Counter[bytes] = field(default_factory=Counter)
    counts: list[int] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        name = request.context[: request.prompt_tokens].tobytes()
        self.live[name] += 1
        self.counts.append(len(+self.live))
        try:
            return await super().generate(request)
        finally:
            self.live[name] -= 1


async def _grow(driver: TreeDriver, step: int) -> list[Tree]:
    prompts = [Prompt(str(i), prompt_tokens(i, PROMPT_TOKENS), "", "", "") for i in range(60)]
    return [tree async for tree in driver.sample(prompts, step) if isinstance(tree, Tree)]


def _driver(engine: LiveCounter) -> TreeDriver:
    """One whose engine's cache holds two trees at their largest."""
    return TreeDriver([engine], SAMPLING, str, seed=0, kv_tokens=KV_TOKENS)


def test_trees_that_turn_out_small_make_room_for_others() -> None:
    engine = LiveCounter(end=0.1, shuffle=1)
    trees = asyncio.run(_grow(_driver(engine), step=1))
    size = PROMPT_TOKENS + float(np.mean([tree.unique_tokens() for tree in trees]))
    assert max(engine.counts[: SAMPLING.width // 4]) <= 2
    # The estimate is a mean that still moves: a quarter over it is what half-grown trees leave free.
    assert 2 < max(engine.counts) <= 1.25 * KV_TOKENS / size


def test_a_later_step_begins_with_what_the_earlier_ones_showed() -> None:
    async def grow_twice() -> tuple[list[int], list[int]]:
        engine = LiveCounter(end=0.1, shuffle=1)
        driver = _driver(engine)
        await _grow(driver, step=1)
        first = engine.counts[:20]
        engine.counts.clear()
        await _grow(driver, step=2)
        return first, engine.counts[:20]

    first, later = asyncio.run(grow_twice())
    assert max(later) > max(first)
