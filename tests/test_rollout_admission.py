"""How many trees the driver lets live at once, when it has to judge by the trees so far."""

import asyncio
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
class CacheCounter(FakeEngine):
    """Remembers, at the start of every request, how many prompts had one running, and how many tokens lay on
    the running paths once all of them had come to their end, a shared one once.
    """

    running_paths: list[np.ndarray] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        path = np.concatenate([request.context, self.answer(request).tokens])
        self.running_paths.append(path)
        known = [running.tobytes() for running in self.running_paths]
        self.prompts.append(len({running[: 4 * PROMPT_TOKENS] for running in known}))
        self.tokens.append(len({running[:end] for running in known for end in range(4, len(running) + 1, 4)}))
        try:
            return await super().generate(request)
        finally:
            self.running_paths = [running for running in self.running_paths if running is not path]


async def _grow(driver: TreeDriver, step: int) -> list[Tree]:
    prompts = [Prompt(str(i), prompt_tokens(i, PROMPT_TOKENS), "", "", "") for i in range(30)]
    return [tree async for tree in driver.sample(prompts, step) if isinstance(tree, Tree)]


def _driver(engine: CacheCounter) -> TreeDriver:
    """One whose engine's cache holds two trees at their largest."""
    return TreeDriver([engine], SAMPLING, str, seed=0, kv_tokens=KV_TOKENS)


def test_trees_that_turn_out_small_make_room_for_others() -> None:
    engine = CacheCounter(end=0.1, shuffle=1)
    asyncio.run(_grow(_driver(engine), step=1))
    assert max(engine.prompts[: SAMPLING.width // 4]) <= 2
    assert max(engine.prompts) > 2
    assert max(engine.tokens) <= KV_TOKENS


def test_a_later_step_begins_with_what_the_earlier_ones_showed() -> None:
    async def grow_twice() -> tuple[list[int], list[int]]:
        engine = CacheCounter(end=0.1, shuffle=1)
        driver = _driver(engine)
        await _grow(driver, step=1)
        first = engine.prompts[:20]
        engine.prompts.clear()
        await _grow(driver, step=2)
        assert max(engine.tokens) <= KV_TOKENS
        return first, engine.prompts[:20]

    first, later = asyncio.run(grow_twice())
    assert max(later) > max(first)
