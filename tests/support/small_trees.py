"""Trees from lists of parents and rewards, and changes of a tree that should not matter."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.support.random_trees import random_tree
from treepo.config.learning import LearningConfig
from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree, Verdict


def config_of(**options: object) -> LearningConfig:
    """The defaults with `options` changed."""
    return LearningConfig.model_validate(options)


def tree_of(
    parents: Sequence[int], rewards: Sequence[float | None], lengths: Sequence[int] | None = None
) -> Tree:
    """A tree. rewards: of the childless segments, in order. lengths: tokens of each segment, by default 1."""
    lengths = [1] * len(parents) if lengths is None else lengths
    segments = tuple(
        Segment(
            parent=parent,
            tokens=np.arange(length, dtype=np.int32) + 10 * index,
            log_probs=np.full(length, -0.5, dtype=np.float32),
            versions=np.zeros(length, dtype=np.int32),
            finish=Finish.LENGTH,
        )
        for index, (parent, length) in enumerate(zip(parents, lengths, strict=True))
    )
    childless = [index for index in range(len(parents)) if index not in parents]
    leaves = tuple(
        Leaf(index, Stop.EOS, reward, Verdict.ERROR if reward is None else Verdict.CORRECT)
        for index, reward in zip(childless, rewards, strict=True)
    )
    return Tree("p", np.array([1, 2], dtype=np.int32), segments, leaves)


def random_batch(
    rng: np.random.Generator, trees: int, ungraded: float = 0.0, least_leaves: int = 1, **shape: int
) -> list[Tree]:
    """Draw trees with continuous rewards; the share `ungraded` of their leaves has none."""
    batch: list[Tree] = []
    while len(batch) < trees:
        tree = random_tree(rng, f"p{len(batch)}", **shape)
        rewards = [None if rng.random() < ungraded else float(rng.normal()) for _ in tree.leaves]
        if len(tree.leaves) >= least_leaves:
            batch.append(
                tree.graded(
                    [(reward, Verdict.TIMEOUT if reward is None else Verdict.CORRECT) for reward in rewards]
                )
            )
    return batch


def relabelled(tree: Tree, rng: np.random.Generator) -> tuple[Tree, list[int]]:
    """Shuffle a tree's leaves, and its segments topologically; return the old place of each new leaf too."""
    left, order = list(range(len(tree.segments))), []
    while left:
        ready = [index for index in left if tree.segments[index].parent in (PROMPT, *order)]
        order.append(int(rng.choice(ready)))
        left.remove(order[-1])
    place = {PROMPT: PROMPT} | {old: new for new, old in enumerate(order)}
    segments = tuple(replace(tree.segments[old], parent=place[tree.segments[old].parent]) for old in order)
    leaf_order = rng.permutation(len(tree.leaves)).tolist()
    leaves = tuple(replace(tree.leaves[old], segment=place[tree.leaves[old].segment]) for old in leaf_order)
    return replace(tree, segments=segments, leaves=leaves), leaf_order


def without_ungraded(tree: Tree) -> Tree | None:
    """The tree of the graded leaves alone; None if there are none."""
    graded = [leaf for leaf in tree.leaves if leaf.reward is not None]
    kept = sorted({index for leaf in graded for index in tree.path(leaf.segment)})
    place = {PROMPT: PROMPT} | {old: new for new, old in enumerate(kept)}
    if not graded:
        return None
    return replace(
        tree,
        segments=tuple(replace(tree.segments[old], parent=place[tree.segments[old].parent]) for old in kept),
        leaves=tuple(replace(leaf, segment=place[leaf.segment]) for leaf in graded),
    )
