"""Packs of a step, made of simulated trees by the real packing: the trainer's time follows from them.

Every other leaf is correct, because advantages do not change what a pack costs. The trees make up as many
mini-batches as they fill, or one of fewer replicas; the other mini-batches and replicas are like these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bridge.attention import CUDA_BLOCK
from treepo.config.run import RunConfig
from treepo.config.trainer import ParallelConfig
from treepo.learning.advantage import estimate
from treepo.learning.packing import Pack, pack_flat, pack_trees, padded
from treepo.learning.slicing import imbalance, pack_slices, sliced_length
from treepo.planning.simulation.workload import half_correct
from treepo.tree import Tree

_MAX_TREES = 512


@dataclass(frozen=True, slots=True)
class ReplicaWork:
    """One replica's part of one mini-batch.

    tokens: of all micro-batches, repeated context included. pairs: of a token and one that it attends to,
    itself included. fullest: pairs of the slice with the most, over the mean of the slices; they wait for one
    another in every layer.
    """

    micro_batches: float
    tokens: float
    pairs: float
    fullest: float = 1.0


def replica_work(
    config: RunConfig, trees: Sequence[Tree], max_trees: int = _MAX_TREES
) -> list[list[ReplicaWork]]:
    """Parts of some mini-batches; of each mini-batch, those of some replicas. max_trees: that are packed."""
    learning, trainer = config.learning, config.trainer
    share = config.data.prompts_per_step // (learning.mini_batches * trainer.parallel.data)
    used = trees[:max_trees]
    replicas = max(1, min(len(used) // share, trainer.parallel.data))
    size = min(replicas * share, len(used))
    return [
        _packed(config, used[start : start + size], replicas, share)
        for start in range(0, len(used) - size + 1, size)
    ]


def _packed(config: RunConfig, trees: Sequence[Tree], replicas: int, share: int) -> list[ReplicaWork]:
    """The trees as one mini-batch. share: trees of each replica; fewer than one replica has stand for all."""
    pack = pack_trees if config.learning.packing == "tree" else pack_flat
    graded = [half_correct(tree) for tree in trees]
    packed = pack(graded, estimate(graded, config.learning), config.trainer.max_tokens_per_pack, replicas)
    scale = replicas * share / len(trees)
    return [
        ReplicaWork(
            scale * len(packs),
            scale * sum(map(len, packs)),
            scale * sum(map(_pairs, packs)),
            sum(_fullest(pack, config.trainer.parallel) * _pairs(pack) for pack in packs)
            / sum(map(_pairs, packs)),
        )
        for packs in packed
    ]


def _fullest(pack: Pack, parallel: ParallelConfig) -> float:
    """`imbalance` of the pack's slices in a GPU's blocks, with padding."""
    if parallel.context == 1:
        return 1.0
    length = sliced_length(len(pack), parallel.context, CUDA_BLOCK, parallel.sequence_multiple)
    position = padded(pack, length).position
    return imbalance(position, pack_slices(position, parallel.context, CUDA_BLOCK))


def _pairs(pack: Pack) -> int:
    """A token attends to the tokens above it, as many as its position, and to itself."""
    return int(pack.position.sum(dtype=np.int64)) + len(pack)
