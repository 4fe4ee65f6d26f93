"""A weight update is a transaction: pause, send, verify, commit the version, resume."""

from treepo.orchestration.engines import EnginePool
from treepo.orchestration.learners import LearnerGroup


async def update_weights(learner: LearnerGroup, engines: EnginePool, version: int) -> None:
    """Every engine serves the learner's weights as `version`, or an error says which one does not.

    An engine serves nothing from `begin` to `commit`, and verifies at the commit that exactly the names
    that were sent arrived; prefixes cached under another version can never match afterwards.
    """
    await engines.call("begin", version)
    names = await learner.send_weights([engine.actor for engine in engines.engines])
    await engines.call("commit", names)
