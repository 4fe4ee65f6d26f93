"""Packs for the computation that precedes the first step."""

from collections.abc import Iterator

import numpy as np

from treepo.learning.packing import Pack


def warm_up_packs(tokens: int, number: int) -> Iterator[list[Pack]]:
    """Yield `number` full packs, then as many of half the length.

    The compiler takes the first length for a constant, and a second one as a sign that lengths vary.
    """
    for length in (tokens, max(1, tokens // 2)):
        yield [_chain(length)] * number


def _chain(tokens: int) -> Pack:
    """One trajectory of zeros; all its tokens but the first are trained, with advantages of 0."""
    index = np.arange(tokens, dtype=np.int32)
    zero, none = np.zeros(tokens), np.full(tokens, -1, dtype=np.int32)
    return Pack(
        token=np.zeros_like(index),
        position=index,
        exit=np.full_like(index, tokens),
        source=index - 1,
        advantage_pos=zero,
        advantage_neg=zero,
        count_pos=np.minimum(index, 1).astype(np.float64),
        count_neg=zero,
        rollout_log_prob=zero.astype(np.float32),
        version=none,
        tree=none,
        segment=none,
        offset=index,
        leaf_weight=1.0,
        old_log_prob=zero.astype(np.float32),
        reference_log_prob=zero.astype(np.float32),
    )
