# ruff: noqa: N815 - the suffix names the dimension (CONTRIBUTING.md)
"""Advantages of a batch of trees: the factor of each token's probability ratio in the loss.

The estimator (treepo.learning.estimators) turns rewards into one value for each segment of each trajectory;
leaf weights, whitening, clipping and the loss's normalisation are applied here, alike for all estimators.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo.config.learning import LearningConfig
from treepo.learning.cut_groups import Parts
from treepo.learning.estimators import ESTIMATORS, Batch, inverse_branching
from treepo.learning.forest import Forest
from treepo.tree import Tree

WHITEN_EPSILON = 1e-8  # added to the variance


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """Advantages and weights of the leaves of `forest`.

    value_M: float64, one advantage for each segment of each path; those of leaf l start at
        `forest.path_offset_L[l]`, the prompt's child first.
    leaf_weight_L: float64, the leaf's weight among trajectories; 0 if it is not graded.
    token_weight_L: float64, the weight in the loss of each token of the leaf's response: its leaf weight,
        under `normalisation: sequence_mean` divided by the response's tokens.
    """

    forest: Forest
    value_M: np.ndarray
    leaf_weight_L: np.ndarray
    token_weight_L: np.ndarray

    def part(self, start: int, stop: int) -> "Advantages":
        """The advantages of the trees `start` to `stop` of the batch."""
        leaves = slice(*self.forest.first_leaf_P[[start, stop]].tolist())
        steps = slice(*self.forest.path_offset_L[[leaves.start, leaves.stop]].tolist())
        return Advantages(
            forest=self.forest.part(start, stop),
            value_M=self.value_M[steps],
            leaf_weight_L=self.leaf_weight_L[leaves],
            token_weight_L=self.token_weight_L[leaves],
        )


def estimate(trees: Sequence[Tree], config: LearningConfig) -> Advantages:
    """Compute the advantages of a whole batch; whitening spans all of `trees`."""
    forest = Forest.of(trees)
    if config.cut_baselines:
        value_M, weight_L, counted_M = _values_by_cut(trees, forest, config)
    else:
        value_M, weight_L = _values(forest, config)
        counted_M = np.ones(len(value_M), dtype=bool)
    token_M = counted_M * weight_L[forest.path_leaf_M] * forest.length_N[forest.path_node_M]
    value_M = np.where(token_M > 0, value_M, 0.0)
    if ESTIMATORS[config.estimator].whiten:
        value_M = whiten(value_M, token_M)
    if config.advantage_clip is not None:
        value_M = value_M.clip(-config.advantage_clip, config.advantage_clip)
    per_token = forest.response_tokens_L if config.normalisation == "sequence_mean" else 1.0
    return Advantages(forest, value_M, leaf_weight_L=weight_L, token_weight_L=weight_L / per_token)


def _values(forest: Forest, config: LearningConfig) -> tuple[np.ndarray, np.ndarray]:
    """The estimator's values, one for each segment of each path ([M]), and the leaves' weights ([L])."""
    estimator = ESTIMATORS[config.estimator]
    weight_L = forest.graded_L.astype(np.float64)
    if config.leaf_weights == "inverse_branching":
        weight_L = inverse_branching(forest)
    options = {name: getattr(config, name) for name in estimator.options}
    value = estimator.function(Batch(forest, weight_L), **options)
    return value[forest.path_leaf_M] if estimator.per == "leaf" else value, weight_L


def _values_by_cut(
    trees: Sequence[Tree], forest: Forest, config: LearningConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_values`, each cut's leaves by themselves; and which values count ([M]): not those above the cut,
    nor those of a cut's only leaf.
    """
    parts = Parts.of(trees, forest)
    part_value_M, part_weight_L = _values(parts.forest, config)
    steps = len(forest.path_leaf_M)
    value_M, counted_M = np.zeros(steps), np.zeros(steps, dtype=bool)
    value_M[parts.step_M], counted_M[parts.step_M] = part_value_M, parts.compared_M
    weight_L = np.zeros(len(forest.leaf_node_L))
    weight_L[parts.leaf_L] = part_weight_L
    return value_M, weight_L, counted_M


def whiten(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(values - mean) / sqrt(unbiased variance + epsilon); values of weight 0 become 0."""
    total = weights.sum()
    if total == 0:
        return values
    centred = values - (weights * values).sum() / total
    variance = (weights * centred**2).sum() / max(total - 1, 1)
    return np.where(weights > 0, centred / np.sqrt(variance + WHITEN_EPSILON), 0.0)
