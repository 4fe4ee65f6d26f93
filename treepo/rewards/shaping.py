"""Soft overlong punishment: a reward falls as a response comes near its limit (DAPO, equation 13)."""

from dataclasses import replace

from treepo.config.learning import LearningConfig
from treepo.forest import Forest
from treepo.tree import Tree


def overlong_penalty(tokens: int, limit: int, buffer: int, factor: float) -> float:
    """0 up to `limit - buffer` tokens, then linear down to `-factor` at `limit` and beyond."""
    return -factor * min(max(tokens - (limit - buffer), 0) / buffer, 1.0)


def shape_overlong(tree: Tree, config: LearningConfig, max_response_tokens: int) -> Tree:
    """The same tree, the penalty added to the reward of each graded leaf; verdicts stay.

    Comes after dynamic sampling, which asks whether answers differ, not whether lengths do. The identity
    where `overlong_buffer_tokens` is null.
    """
    buffer, factor = config.overlong_buffer_tokens, config.overlong_penalty
    if buffer is None:
        return tree
    return replace(
        tree,
        leaves=tuple(
            leaf
            if leaf.reward is None
            else replace(
                leaf, reward=leaf.reward + overlong_penalty(tokens, max_response_tokens, buffer, factor)
            )
            for leaf, tokens in zip(tree.leaves, Forest.of([tree]).response_tokens_L.tolist(), strict=True)
        ),
    )
