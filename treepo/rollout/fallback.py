"""Fallback: chooses the finished leaves that a tree without active paths continues, and where to cut them.

Pure functions of the finished leaves. `GrowingTree` decides when a tree falls back, and cuts it; the orders
and cut rules themselves are in `policies`. Departures from the official code: a cut moves back to a segment
boundary unless `aligned` is false, and the continuation starts from exactly the tokens above the cut
(`GrowingTree` sees to that).
"""

from collections.abc import Sequence

import numpy as np

from treepo.config.sampling import SamplingConfig
from treepo.rollout.policies import CUTS, ORDERS, Candidate, FallbackSizes


def order(candidates: Sequence[Candidate], config: SamplingConfig, rng: np.random.Generator) -> list[int]:
    """Indices of the leaves to continue, first to last; empty if the order admits none."""
    return ORDERS[config.fallback.order](candidates, _sizes(config), rng)


def cut_point(candidate: Candidate, config: SamplingConfig, rng: np.random.Generator) -> int:
    """How many of the response's tokens stay: fewer than all of them; 0 restarts from the prompt.

    A response shorter than `window_tokens`, if it is set, restarts. The cut leaves room for one segment under
    max_depth.
    """
    sizes, shortest = _sizes(config), config.fallback.window_tokens
    if shortest is not None and len(candidate.log_probs) < shortest:
        return 0
    cut = CUTS[config.fallback.cut](candidate, sizes, rng)
    cut = min(cut, (config.max_depth - 1) * config.segment_tokens)
    if config.fallback.aligned:
        cut = max((boundary for boundary in candidate.boundaries if boundary <= cut), default=0)
    return cut


def _sizes(config: SamplingConfig) -> FallbackSizes:
    fallback = config.fallback
    return FallbackSizes(
        window=fallback.window_tokens or config.segment_tokens,
        block=fallback.block_tokens,
        max_windows=fallback.max_windows,
        min_windows=fallback.min_windows or 1,
    )
