"""Make the trainer's micro-batches of the same trees in two ways: packed, and one trajectory at a time."""

from dataclasses import dataclass

import numpy as np

from benchmarks.full_tree import WIDTH, full_tree
from treepo.config.learning import LearningConfig
from treepo.learning.advantage import estimate
from treepo.learning.loss import denominator
from treepo.learning.packing import Pack, pack_flat, pack_trees


@dataclass(frozen=True, slots=True)
class Setting:
    """Trees of 16 leaves, each with `leaf_tokens` response tokens in segments of `segment_tokens`. The first
    level has `initial_branching` segments, each further level twice as many, up to 16.
    """

    prompts: int
    prompt_tokens: int
    leaf_tokens: int
    segment_tokens: int
    initial_branching: int
    max_tokens_per_pack: int

    @property
    def trajectory_tokens(self) -> int:
        """Tokens of one trajectory, the prompt included."""
        return self.prompt_tokens + self.leaf_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of all trajectories, the prompts included."""
        return self.prompts * WIDTH * self.trajectory_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """One mini-batch on one replica. packs: under "packed" and "flat"."""

    packs: dict[str, list[Pack]]
    denominator: float
    unique_tokens: int

    def tokens(self, way: str) -> int:
        """Tokens in all packs, the repeated context of split trees included."""
        return sum(len(pack) for pack in self.packs[way])


def work(setting: Setting, vocabulary: int) -> Work:
    """Make the mini-batch of `setting`, with random tokens and rewards."""
    depth, rest = divmod(setting.leaf_tokens, setting.segment_tokens)
    assert not rest, f"{setting.leaf_tokens} tokens are no whole number of segments"
    rng = np.random.default_rng(0)
    trees = [
        full_tree(
            rng,
            depth,
            setting.initial_branching,
            setting.prompt_tokens,
            vocabulary,
            setting.segment_tokens,
        )
        for _ in range(setting.prompts)
    ]
    learning = LearningConfig()
    advantages = estimate(trees, learning)
    (packed,) = pack_trees(trees, advantages, setting.max_tokens_per_pack, replicas=1)
    (flat,) = pack_flat(trees, advantages, setting.max_tokens_per_pack, replicas=1)
    return Work(
        packs={"packed": packed, "flat": flat},
        denominator=denominator([packed], learning),
        unique_tokens=sum(len(tree.prompt) + tree.unique_tokens() for tree in trees),
    )
