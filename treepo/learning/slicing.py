"""Divide a pack's tokens among the ranks of a context group: equal tokens, and equal work in attention.

Keys and values of all tokens are gathered for attention (megatron_bridge.attention), so any set of tokens may
be a rank's slice. Its work is the number of pairs of a token and one that it attends to: `position` + 1 for
each token. Slices consist of whole blocks of consecutive tokens, because masks are cheap for those.
"""

from math import lcm

import numpy as np

_BLOCKS = 8  # of a slice, at least, if blocks may be that small


def block_size(tokens: int, ranks: int, least: int, most: int) -> int:
    """The tokens of a block: `most`, halved down to `least` until a slice of the pack has eight blocks."""
    block = most if ranks > 1 else least
    while block > least and tokens < _BLOCKS * ranks * block:
        block //= 2
    return block


def sliced_length(tokens: int, ranks: int, block: int, multiple: int) -> int:
    """The length to which a pack is padded: ranks get whole blocks and a multiple of `multiple` tokens."""
    unit = ranks * lcm(block, multiple)
    return tokens + -tokens % unit


def pack_slices(position_T: np.ndarray, ranks: int, block: int) -> np.ndarray:
    """The tokens of each rank, in order: int64 [ranks, T / ranks].

    position_T: int32 [T], of a pack of `sliced_length`. Blocks are dealt out in rounds, those with the most
    pairs first; in each round the rank with the fewest pairs takes the largest block. The ranks' pairs then
    differ by at most those of one block.
    """
    if ranks == 1:
        return np.arange(len(position_T))[None]
    pairs_B = (position_T.reshape(-1, block).sum(axis=1, dtype=np.int64) + block).tolist()
    by_pairs = sorted(range(len(pairs_B)), key=pairs_B.__getitem__, reverse=True)
    loads, blocks = [0] * ranks, [[] for _ in range(ranks)]
    for first in range(0, len(by_pairs), ranks):
        takers = sorted(range(ranks), key=loads.__getitem__)
        for rank, index in zip(takers, by_pairs[first : first + ranks], strict=True):
            blocks[rank].append(index)
            loads[rank] += pairs_B[index]
    starts = np.sort(np.array(blocks), axis=1) * block
    return (starts[:, :, None] + np.arange(block)).reshape(ranks, -1)


def imbalance(position_T: np.ndarray, slices: np.ndarray) -> float:
    """The pairs of the rank with the most over the mean of all ranks. slices: of `pack_slices`."""
    pairs = position_T[slices].sum(axis=1, dtype=np.int64) + slices.shape[1]
    return float(pairs.max() / pairs.mean())
