"""The KL divergence in the rewards equals a loop over leaves and tokens."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.support.fake_trainer import FakeTrainer
from tests.support.small_trees import random_batch
from treepo.config.load import load_as
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.learning.packing import Pack
from treepo.training.kl_reward import with_kl_in_rewards


class OtherReference(FakeTrainer):
    """Reference log-probs that depend on the token alone; NaN-free and far from the engine's."""

    async def reference_log_probs(
        self, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]:
        assert temperature == 0.7
        return [[reference(pack.token) for pack in replica] for replica in packs]


def reference(token: np.ndarray) -> np.ndarray:
    return (-1.0 - 0.1 * (token % 7)).astype(np.float32)


def config_of(**learning: object) -> RunConfig:
    settings = {"kl_coefficient": 0.3, "kl_in": "reward", **learning}
    fixed = ["steps=1", "out=o", "model.path=m", "data.train=t.jsonl"]
    fixed += [
        "data.prompts_per_step=4",
        "trainer.parallel.data=2",
        "trainer.max_tokens_per_pack=40",
        "data.max_prompt_tokens=10",
        "sampling={segment_tokens: 6, max_depth: 5, max_response_tokens: 30, temperature: 0.7}",
    ]
    return load_as(RunConfig, None, [*fixed, *(f"learning.{key}={value}" for key, value in settings.items())])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("packing", ["tree", "flat"])
def test_every_graded_leaf_pays_for_its_own_response(estimator: str, packing: str) -> None:
    config = config_of(kl_estimator=estimator, packing=packing)
    rng = np.random.default_rng(3)
    trees = random_batch(rng, 6, ungraded=0.2, max_depth=4, max_tokens=4, least_leaves=2, vocabulary=50)
    changed, mean = asyncio.run(with_kl_in_rewards(trees, OtherReference(), config))
    all_kl, tokens = 0.0, 0
    for before, after in zip(trees, changed, strict=True):
        assert replace(after, leaves=before.leaves).segments is before.segments
        for old, new in zip(before.leaves, after.leaves, strict=True):
            if old.reward is None:
                assert new is old
                continue
            segments = [before.segments[node] for node in before.path(old.segment)]
            log_prob = np.concatenate([segment.log_probs for segment in segments]).astype(np.float64)
            ratio = log_prob - reference(np.concatenate([segment.tokens for segment in segments]))
            kl = {"k1": ratio, "k2": ratio**2 / 2, "k3": np.exp(-ratio) - 1 + ratio}[estimator].sum()
            # Sums of tens of float64 numbers in another order.
            assert new.reward == pytest.approx(old.reward - 0.3 * kl, rel=1e-9)
            assert new.verdict is old.verdict
            all_kl, tokens = all_kl + kl, tokens + len(log_prob)
    assert mean == pytest.approx(all_kl / tokens, rel=1e-9)


def test_without_a_graded_leaf_there_is_nothing_to_pay() -> None:
    trees = random_batch(np.random.default_rng(0), 2, ungraded=1.0, vocabulary=50)
    changed, mean = asyncio.run(with_kl_in_rewards(trees, OtherReference(), config_of()))
    assert [tree.leaves for tree in changed] == [tree.leaves for tree in trees]
    assert np.isnan(mean)


def test_a_weight_is_needed() -> None:
    with pytest.raises(
        ConfigError, match="kl_in = reward with kl_coefficient = 0: there is nothing to subtr"
    ):
        config_of(kl_coefficient=0)
