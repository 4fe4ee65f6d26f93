"""Draws tokens at uniform numbers that depend only on a seed and a position."""

import numpy as np
import torch
from torch import Tensor


def uniform(seed: np.ndarray, position: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each pair: float64, in the shape of `seed` and `position` (integers).

    SplitMix64 (Steele, Lea and Flood, 2014): the seed selects the stream, the position the draw.
    """
    stream = _mix(seed.astype(np.uint64))
    draw = _mix(stream + position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (draw >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def invert(probs: Tensor, number: Tensor) -> Tensor:
    """The token at `number` of each row's cumulative distribution: int32 [B] from [B, V] and [B].

    A token of probability 0 is never drawn. A row that is not a distribution (NaN) gives an arbitrary token;
    its log-prob shows the fault.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = number[:, None] * cumulative[:, -1:]
    # If rounding brings the target up to the sum, the last token that adds to the sum is meant.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    drawn = torch.searchsorted(cumulative, target, right=True)
    return torch.minimum(drawn, last).clamp_(max=probs.shape[-1] - 1)[:, 0].to(torch.int32)
