"""Learns from a batch: packs it, trains on it, and gives the engines the new weights."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from treepo.config.run import RunConfig
from treepo.errors import RewardError
from treepo.learning.advantage import estimate
from treepo.learning.loss import denominator
from treepo.learning.packing import pack_flat, pack_trees, split_mini_batches
from treepo.protocols import BatchResult, MiniBatch, Trainer, TrainingEnginePool
from treepo.training.run_state import Clock
from treepo.tree import Tree


async def learn(
    trees: Sequence[Tree],
    step: int,
    config: RunConfig,
    engines: TrainingEnginePool,
    trainer: Trainer,
    clock: Clock,
    paused: Callable[[], AbstractContextManager[None]],
    before_sync: Callable[[], Awaitable[None]],
) -> BatchResult:
    """Train on graded trees, then make the engines serve the new weights as version `step`.

    paused: entered while the engines do not sample: in a synchronous run all the time, else during the weight
    sync. before_sync: what must end under the old weights. Raises RewardError if no response could be graded,
    and FloatingPointError if a gradient is not finite.
    """
    synchronous = config.loop.mode == "sync"
    with ExitStack() as pause:
        if synchronous:
            pause.enter_context(paused())
        async with engines.training():
            with clock.phase("log-probs"):
                parts = mini_batches(trees, config)
            clock.show("log-probs, train")
            result = await trainer.train_batch(parts, config.sampling.temperature)
            clock.count("log-probs", result.seconds["log_probs"])
            clock.count("train", result.seconds["train"])
            await before_sync()
            if not synchronous:
                pause.enter_context(paused())
            with clock.phase("weight sync"):
                await engines.sync_weights(step)
    return result


def mini_batches(trees: Sequence[Tree], config: RunConfig) -> list[MiniBatch]:
    """Pack the trees for the optimizer steps, with advantages of the whole batch.

    Leaves out a mini-batch without any graded response. Raises RewardError if there are trees but no graded
    response.
    """
    learning, trainer = config.learning, config.trainer
    pack = pack_trees if learning.packing == "tree" else pack_flat
    packed = [
        pack(part, advantages, trainer.max_tokens_per_pack, trainer.parallel.data)
        for part, advantages in split_mini_batches(trees, estimate(trees, learning), learning.mini_batches)
    ]
    graded = [MiniBatch(packs, total) for packs in packed if (total := denominator(packs, learning)) > 0]
    if packed and not graded:
        raise RewardError(
            "no response of this step could be graded (reward.deadline_seconds, reward.memory_mb)"
        )
    return graded
