"""One pool of math-verify processes for all tests of mathematics: a process takes seconds to start."""

from collections.abc import Iterator

import pytest

from treepo.config.reward import RewardConfig
from treepo.rewards.pool import RewardPool


@pytest.fixture(scope="package")
def math_pool() -> Iterator[RewardPool]:
    """Rewards that are not the defaults; a deadline that only a stuck process misses."""
    with RewardPool(RewardConfig(workers=2, deadline_seconds=60, correct=2.0, wrong=-0.5)) as pool:
        yield pool
