"""benchmarks/learning/gradients.py: its gradient is a naive one, and its noise is unbiased."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.learning import gradients
from benchmarks.learning.gradients import cosine, gradient, noise
from tests.support.random_trees import random_tree
from treepo.config.learning import LearningConfig
from treepo.toy.warmstart import new_model

LEARNING = LearningConfig(estimator="dr_grpo")


def test_the_gradient_is_the_mean_over_tokens_of_advantage_times_log_prob(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "CHUNK", 3)
    rng = np.random.default_rng(0)
    trees = [random_tree(rng) for _ in range(3)]
    model = new_model(0)
    found = gradient(model, trees, LEARNING)
    loss, tokens = torch.zeros(()), 0
    for tree in trees:
        rewards = [leaf.reward or 0.0 for leaf in tree.leaves]
        for leaf, reward in zip(tree.leaves, rewards, strict=True):
            response = tree.response(leaf)
            whole = torch.from_numpy(np.concatenate([tree.prompt, response]).astype(np.int64))
            log_probs = model(whole[None, :-1]).logits[0].log_softmax(-1)
            chosen = log_probs[torch.arange(len(whole) - 1), whole[1:]][-len(response) :]
            loss = loss - (reward - float(np.mean(rewards))) * chosen.sum()
            tokens += len(response)
    model.zero_grad()
    (loss / tokens).backward()
    naive = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy()
    # float32 sums in another order
    np.testing.assert_allclose(found, naive, rtol=1e-4, atol=1e-6)


def test_equal_rewards_have_no_gradient() -> None:
    tree = random_tree(np.random.default_rng(1))
    equal = replace(tree, leaves=tuple(replace(leaf, reward=1.0) for leaf in tree.leaves))
    assert not gradient(new_model(0), [equal], LEARNING).any()


def test_noise_is_the_variance_over_the_squared_mean() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=400)
    drawn = mean + 2 * rng.normal(size=(200, 400))
    # 200 draws of a variance of 4 a coordinate, of which the mean's square is about 1
    assert noise(drawn) == pytest.approx(4 * 400 / float(mean @ mean), rel=0.1)
    assert noise(np.array([[1.0, 0.0], [-1.0, 0.0]])) == float("inf")
    assert cosine(mean, 3 * mean) == pytest.approx(1)
