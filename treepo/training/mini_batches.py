"""Packs a batch for the trainer."""

from collections.abc import Sequence

from treepo.config.run import RunConfig
from treepo.errors import RewardError
from treepo.learning.advantage import estimate
from treepo.learning.loss import denominator
from treepo.learning.packing import pack_flat, pack_trees, split_mini_batches
from treepo.protocols import MiniBatch
from treepo.tree import Tree


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
