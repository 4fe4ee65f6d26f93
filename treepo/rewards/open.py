"""The grader that a configuration asks for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from treepo.config.reward import RewardConfig
from treepo.rewards.grade import Rewards
from treepo.rewards.pool import RewardPool


@asynccontextmanager
async def open_rewards(config: RewardConfig) -> AsyncIterator[Rewards]:
    """A grader that is ready, until the block ends.

    Raises ConfigError for a function that cannot be imported or an endpoint that does not answer.
    """
    if config.url is None:
        with RewardPool(config) as pool:
            await pool.ready()
            yield pool
        return
    from treepo.rewards.endpoint import HttpRewards  # a quarter of a second that the others need not pay

    async with HttpRewards(config) as rewards:
        await rewards.ready()
        yield rewards
