"""A weight update is a transaction: pause, send, verify, commit the version, resume."""

import asyncio
from collections.abc import Sequence

from treepo.orchestration.learners import LearnerGroup
from treepo.orchestration.supervised_engine import SupervisedEngine


async def update_weights(learner: LearnerGroup, engines: Sequence[SupervisedEngine], version: int) -> None:
    """These engines serve the learner's weights as `version`, or an error says which one does not.

    An engine serves nothing from `begin` to `commit`, and verifies at the commit that exactly the names
    that were sent arrived; prefixes cached under another version can never match afterwards.
    """
    await asyncio.gather(*(engine.call("begin", version) for engine in engines))
    names = await learner.send_weights([engine.process.actor for engine in engines])
    await asyncio.gather(*(engine.call("commit", names) for engine in engines))
