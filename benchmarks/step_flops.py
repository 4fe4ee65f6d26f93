"""Count the floating-point operations of a train step's matrix products, forward and backward.

    6 x parameters of the layers' matrices x tokens
    + 6 x vocabulary x hidden x trained tokens
    + 12 x layers x heads x head size x pairs

A pair is a token and a token that it attends to, itself included. Work that is done twice (recomputation, the
repeated context of split trees) is counted once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from treepo.learning.packing import Pack


@dataclass(frozen=True, slots=True)
class Counts:
    """The numbers that a step's operations follow from."""

    tokens: int
    trained: int
    pairs: int


def step_flops(sizes: Mapping[str, int], counts: Counts) -> float:
    """Floating-point operations of one step. sizes: the size keys of a Qwen2 config."""
    hidden, heads, groups = (
        sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    layers, head_size = sizes["num_hidden_layers"], hidden // heads
    layer = 2 * hidden * head_size * (heads + groups) + 3 * hidden * sizes["intermediate_size"]
    return (
        6.0 * layers * layer * counts.tokens
        + 6.0 * sizes["vocab_size"] * hidden * counts.trained
        + 12.0 * layers * heads * head_size * counts.pairs
    )


def every_token(packs: Sequence[Pack]) -> Counts:
    """Count every token of the packs; a token has as many ancestors as its position says."""
    trained = sum(int((pack.count_pos + pack.count_neg > 0).sum()) for pack in packs)
    return Counts(sum(map(len, packs)), trained, sum(int((pack.position + 1).sum()) for pack in packs))


def unique_tokens(packs: Sequence[Pack]) -> Counts:
    """Count each token of a tree once, however many packs it is in."""
    keys = np.concatenate([token_keys(pack) for pack in packs])
    position = np.concatenate([pack.position for pack in packs])
    _, first = np.unique(keys, return_index=True)
    trained = sum(int((pack.count_pos + pack.count_neg > 0).sum()) for pack in packs)  # in one pack each
    return Counts(len(first), trained, int((position[first] + 1).sum()))


def token_keys(pack: Pack) -> np.ndarray:
    """A number that identifies each token's place in its tree: int64 [T]."""
    return (pack.tree.astype(np.int64) << 40) + ((pack.segment.astype(np.int64) + 1) << 20) + pack.offset
