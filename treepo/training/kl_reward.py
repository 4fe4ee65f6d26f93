"""Subtracts the KL divergence from the reference model from the rewards (`learning.kl_in: reward`).

    R'(leaf)  =  R(leaf) - kl_coefficient x sum over its tokens t of k(log p(t) - log p_reference(t))

k is `learning.kl_estimator`, p the policy that sampled the token: the estimate is that of the engine's own
divergence, and no other pass than the reference's is needed. A shared token is computed once.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from treepo.config.run import RunConfig
from treepo.learning.advantage import estimate
from treepo.learning.kl import KL_ESTIMATORS
from treepo.learning.packing import pack_trees
from treepo.protocols import Trainer
from treepo.tree import Leaf, Tree


async def with_kl_in_rewards(
    trees: Sequence[Tree], trainer: Trainer, config: RunConfig
) -> tuple[list[Tree], float]:
    """Return the trees with the divergence in their graded leaves' rewards, and its mean a token over all
    graded trajectories (nan without any).
    """
    learning, layout = config.learning, config.trainer
    advantages = estimate(trees, learning)
    packs = pack_trees(trees, advantages, layout.max_tokens_per_pack, layout.parallel.data)
    reference = await trainer.reference_log_probs(packs, config.sampling.temperature)
    forest = advantages.forest
    kl_N = np.zeros(len(forest.parent_N))
    for pack, log_prob in zip(chain.from_iterable(packs), chain.from_iterable(reference), strict=True):
        trained = pack.count_pos + pack.count_neg > 0  # a token that is context here is trained elsewhere
        log_ratio = torch.from_numpy(pack.rollout_log_prob[trained].astype(np.float64) - log_prob[trained])
        node = forest.first_P[pack.tree[trained]] + 1 + pack.segment[trained]
        np.add.at(kl_N, node, KL_ESTIMATORS[learning.kl_estimator](log_ratio).numpy())
    kl_L = np.bincount(forest.path_leaf_M, kl_N[forest.path_node_M], len(forest.tree_L))
    values = iter(kl_L.tolist())
    penalised = [
        replace(
            tree,
            leaves=tuple(_less(leaf, learning.kl_coefficient * next(values)) for leaf in tree.leaves),
        )
        for tree in trees
    ]
    graded = forest.graded_L
    tokens = forest.response_tokens_L[graded].sum()
    return penalised, float(kl_L[graded].sum() / tokens) if tokens else float("nan")


def _less(leaf: Leaf, penalty: float) -> Leaf:
    return leaf if leaf.reward is None else replace(leaf, reward=leaf.reward - penalty)
