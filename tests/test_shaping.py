"""Overlong shaping: DAPO's soft punishment, by hand and on trees."""

import numpy as np
import pytest
from small_trees import config_of, random_batch

from treepo.rewards.shaping import overlong_penalty, shape_overlong


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0), (6656, 0), (6784, -0.25), (6912, -0.5), (7168, -1), (9000, -1)]
)
def test_the_penalty_of_the_papers_setting(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, limit=7168, buffer=512, factor=1.0) == penalty


def test_only_rewards_of_graded_leaves_change() -> None:
    config = config_of(overlong_buffer_tokens=8, overlong_penalty=0.5)
    for tree in random_batch(np.random.default_rng(0), 10, ungraded=0.3):
        shaped = shape_overlong(tree, config, max_response_tokens=16)
        for before, after in zip(tree.leaves, shaped.leaves, strict=True):
            assert (before.segment, before.stop, before.verdict) == (after.segment, after.stop, after.verdict)
            if before.reward is None:
                assert after.reward is None
            else:
                fall = 0.5 * min(max(len(tree.response(before)) - 8, 0) / 8, 1)
                assert after.reward == pytest.approx(before.reward - fall)
        assert shaped.segments is tree.segments


def test_without_a_buffer_nothing_changes() -> None:
    (tree,) = random_batch(np.random.default_rng(1), 1)
    assert shape_overlong(tree, config_of(), max_response_tokens=2) is tree
