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


def truncate(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The distributions [B, V] with probability 0 for the tokens that each row's three numbers [B] leave out.

    SGLang's own rule: of the `top_k` likeliest tokens those stay before which the likelier ones sum up to at
    most `top_p`, and which have at least `min_p` of the likeliest token's probability. They are not scaled
    up, and `probs` is not changed.
    """
    likeliest, token = probs.sort(dim=-1, descending=True)
    before = likeliest.cumsum(-1) - likeliest
    kept = torch.arange(probs.shape[-1]) < top_k[:, None]
    kept &= (before <= top_p[:, None]) | (top_p[:, None] >= 1)  # rounding may sum up more than 1
    kept &= likeliest >= likeliest[:, :1] * min_p[:, None]
    return torch.zeros_like(probs).scatter_(-1, token, likeliest * kept)
