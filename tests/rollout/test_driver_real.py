"""The driver on the real SGLang engine: log-probs computed again for every policy, caching, seeds."""

from contextlib import aclosing
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support.sampling_policies import POLICIES, sampling
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.stats import Stats
from treepo.rollout.stopping import StopRule
from treepo.tree import Tree

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

END_TOKENS, BOX_TOKEN, VOCABULARY = (1, 2, 3), 4, 128


def decode(tokens: np.ndarray) -> str:
    return "".join("\\boxed{7}" if token == BOX_TOKEN else chr(token + 200) for token in tokens)


def prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(5)
    return [
        Prompt(f"p:{i}", rng.integers(5, VOCABULARY, size=40, dtype=np.int32), "", "", "")
        for i in range(count)
    ]


def grow(real: "RealEngine", config: SamplingConfig, count: int, seed: int = 0) -> tuple[list[Tree], Stats]:
    real.stop_rule.holds = StopRule(config, decode)
    driver = TreeDriver([real.engine], config, decode, seed, kv_tokens=real.engine.capacity())

    async def collect() -> list[Tree | FailedTree]:
        async with aclosing(driver.sample(prompts(count), step=0)) as results:
            return [result async for result in results]

    trees = [result for result in real.run(collect()) if isinstance(result, Tree)]
    assert len(trees) == count
    return sorted(trees, key=lambda tree: tree.prompt_id), driver.stats


@pytest.mark.parametrize("policy", POLICIES)
def test_every_segment_was_sampled_after_the_tokens_that_the_tree_shows(
    real_engine: "RealEngine", policy: str
) -> None:
    config = sampling(**POLICIES[policy])
    trees, stats = grow(real_engine, config, count=2)
    for tree in trees:
        assert len(tree.leaves) <= config.most_leaves
        for leaf in tree.leaves:
            whole = np.concatenate([tree.prompt, tree.response(leaf)])
            computed = real_engine.run(real_engine.engine.log_probs(whole))[len(tree.prompt) - 1 :]
            sampled = np.concatenate([tree.segments[i].log_probs for i in tree.path(leaf.segment)])
            # float32 of one model, in one pass and token by token: a few roundings apart. After a wrong
            # context they would differ by about 1.
            np.testing.assert_allclose(sampled, computed, atol=1e-5)
            assert not set(tree.response(leaf)[:-1].tolist()) & set(END_TOKENS)
    # There are no continuations in `sequential` mode.
    assert stats.cached_token_ratio > 0.98 or stats.continuation_tokens == 0


def test_a_seed_determines_trees_however_many_live_at_once(real_engine: "RealEngine") -> None:
    together, _ = grow(real_engine, sampling(), count=4, seed=3)
    one_by_one, _ = grow(real_engine, sampling(max_live_trees=1), count=4, seed=3)
    other, _ = grow(real_engine, sampling(), count=4, seed=4)

    def responses(trees: list[Tree]) -> list[list[int]]:
        return [tree.response(leaf).tolist() for tree in trees for leaf in tree.leaves]

    assert responses(together) == responses(one_by_one)
    assert responses(together) != responses(other)


def test_children_that_begin_alike_are_one(real_engine: "RealEngine") -> None:
    config = sampling(branch={"lookahead": 2}, branching=3, temperature=0.2, fallback={"cut": "none"})
    trees, stats = grow(real_engine, config, count=4)
    assert stats.pruned_tokens > 0
    kept = stats.decoded_tokens - stats.dropped_tokens - stats.pruned_tokens
    assert kept == sum(tree.unique_tokens() for tree in trees)
    for tree in trees:
        begun = [(segment.parent, *segment.tokens[:2].tolist()) for segment in tree.segments]
        assert len(set(begun)) == len(begun)
        assert max(segment.draws for segment in tree.segments) > 1
