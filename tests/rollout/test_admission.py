"""How many trees the driver admits at once, judging by the trees so far; no prompt waits for ever."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tests.support.fake_engine import FakeEngine, prompt_tokens
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree

SAMPLING = SamplingConfig(segment_tokens=8, max_depth=5, width=12, max_response_tokens=40)
PROMPT_TOKENS = 5
KV_TOKENS = 2 * (PROMPT_TOKENS + 12 * 40)


@dataclass
class CacheCounter(FakeEngine):
    """Records, at the start of every request, how many prompts had a running request, and how many tokens the
    running paths have when all of them have ended, a shared one once.
    """

    running_prompts: Counter[bytes] = field(default_factory=Counter)
    running_tokens: Counter[bytes] = field(default_factory=Counter)  # each by the path down to it
    prompts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        path = np.concatenate([request.context, self.answer(request).tokens]).tobytes()
        prompt, tokens = [path[: 4 * PROMPT_TOKENS]], [path[:end] for end in range(4, len(path) + 1, 4)]
        self.running_prompts.update(prompt)
        self.running_tokens.update(tokens)
        self.prompts.append(len(self.running_prompts))
        self.tokens.append(len(self.running_tokens))
        try:
            return await super().generate(request)
        finally:
            for running, ended in ((self.running_prompts, prompt), (self.running_tokens, tokens)):
                running.subtract(ended)
                for one in ended:
                    if not running[one]:
                        del running[one]


async def _grow(driver: TreeDriver, step: int) -> list[Tree]:
    prompts = [Prompt(str(i), prompt_tokens(i, PROMPT_TOKENS), "", "", "") for i in range(30)]
    return [tree async for tree in driver.sample(prompts, step) if isinstance(tree, Tree)]


def _driver(engine: CacheCounter) -> TreeDriver:
    """A driver on an engine whose cache holds two trees at their largest."""
    return TreeDriver([engine], SAMPLING, str, seed=0, kv_tokens=KV_TOKENS)


def test_trees_that_turn_out_small_make_room_for_others() -> None:
    engine = CacheCounter(end=0.1, shuffle=1)
    asyncio.run(_grow(_driver(engine), step=1))
    assert max(engine.prompts[: SAMPLING.most_leaves // 4]) <= 2
    assert max(engine.prompts) > 2
    assert max(engine.tokens) <= KV_TOKENS


def test_a_later_step_starts_from_what_the_earlier_ones_showed() -> None:
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


def test_a_cache_smaller_than_a_tree_holds_one_at_a_time() -> None:
    engine = CacheCounter(end=0.02, shuffle=1)
    driver = TreeDriver([engine], SAMPLING, str, seed=0, kv_tokens=PROMPT_TOKENS + 40)
    assert len(asyncio.run(_grow(driver, step=1))) == 30
    assert max(engine.prompts) == 1


def test_engines_with_different_kv_caches_are_each_filled_and_none_is_overfilled() -> None:
    engines = [CacheCounter(end=0.1, shuffle=seed) for seed in range(3)]
    kv_tokens = [KV_TOKENS, KV_TOKENS // 2, 2 * KV_TOKENS]
    driver = TreeDriver(engines, SAMPLING, str, seed=0, kv_tokens=kv_tokens)
    for step in range(3):
        assert len(asyncio.run(_grow(driver, step))) == 30
    for engine, tokens in zip(engines, kv_tokens, strict=True):
        assert max(engine.prompts) >= 2
        assert max(engine.tokens) <= tokens


def test_trees_larger_than_any_before_are_not_piled_up() -> None:
    async def grow_small_then_large() -> list[int]:
        engine = CacheCounter(end=0.5, shuffle=1)
        driver = TreeDriver([engine], SAMPLING, str, seed=0, kv_tokens=KV_TOKENS)
        for step in range(3):  # more trees than the router remembers
            await _grow(driver, step)
        engine.end = 0.0
        await _grow(driver, step=3)
        engine.tokens.clear()
        await _grow(driver, step=4)
        await _grow(driver, step=5)
        return engine.tokens[len(engine.tokens) // 2 :]

    # Large trees are a surprise once. When the driver remembers as many of them as of small ones, they get
    # their room.
    assert max(asyncio.run(grow_small_then_large())) <= KV_TOKENS


def test_a_prompt_that_fits_nowhere_waits_only_until_an_engine_is_free() -> None:
    engine = CacheCounter(end=0.1, shuffle=1)
    driver = TreeDriver([engine], SAMPLING, str, seed=0, kv_tokens=KV_TOKENS)
    long = Prompt("long", prompt_tokens(99, 2 * KV_TOKENS), "", "", "")
    short = [Prompt(str(i), prompt_tokens(i, PROMPT_TOKENS), "", "", "") for i in range(20)]

    async def order() -> list[str]:
        trees = [tree async for tree in driver.sample([*short[:10], long, *short[10:]], step=0)]
        return [tree.prompt_id for tree in trees]

    names = asyncio.run(order())
    assert sorted(names[:10], key=int) == [prompt.id for prompt in short[:10]]
    assert names[10] == "long"
    assert sorted(names[11:], key=int) == [prompt.id for prompt in short[10:]]
