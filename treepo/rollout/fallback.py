"""Where a tree goes on that has no active path and leaves to sample: which leaves, cut where.

Pure functions. Departures from the official code: `finished_strict` puts the best endings first (there it
is the worst); cuts move back to a segment boundary unless configured otherwise; the continuation starts
from exactly the tokens above the cut (the caller's part).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from treepo.config.sampling import SamplingConfig
from treepo.tree import Stop

# The official code's weights; it has 6 for an answer that is asked for and left unclosed, which no path is.
_PRIORITY = {Stop.BOXED: 7, Stop.EOS: 5, Stop.DEPTH: 4, Stop.LIMIT: 3, Stop.REPETITION: 2}


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A finished leaf. log_probs: float32 [T] of its response; boundaries: rising lengths in tokens at
    which the segments above it end, its own end included.
    """

    stop: Stop
    log_probs: np.ndarray
    boundaries: Sequence[int]


def order(candidates: Sequence[Candidate], config: SamplingConfig, rng: np.random.Generator) -> list[int]:
    """Indices of the candidates to continue, first to last; empty where the policy admits none."""
    return _ORDERS[config.fallback.order](candidates, config, rng)


def cut_point(candidate: Candidate, config: SamplingConfig, rng: np.random.Generator) -> int:
    """How many of the response's tokens stay: fewer than all, 0 for a restart from the prompt.

    A response shorter than one window restarts. What stays leaves room for one segment under max_depth.
    """
    fallback, length = config.fallback, len(candidate.log_probs)
    if length < _window(config):
        return 0
    cut = _CUTS[fallback.cut](candidate.log_probs, config, rng)
    cut = min(cut, (config.max_depth - 1) * config.segment_tokens)
    if fallback.aligned:
        cut = max((boundary for boundary in candidate.boundaries if boundary <= cut), default=0)
    return cut


def _window(config: SamplingConfig) -> int:
    return config.fallback.window_tokens or config.segment_tokens


def _finished_strict(
    candidates: Sequence[Candidate], _config: SamplingConfig, _rng: np.random.Generator
) -> list[int]:
    return sorted(range(len(candidates)), key=lambda index: -_PRIORITY[candidates[index].stop])


def _finished(
    candidates: Sequence[Candidate], _config: SamplingConfig, rng: np.random.Generator
) -> list[int]:
    return _weighted_order([_PRIORITY[candidate.stop] for candidate in candidates], rng)


def _random(candidates: Sequence[Candidate], _config: SamplingConfig, rng: np.random.Generator) -> list[int]:
    return rng.permutation(len(candidates)).tolist()


def _boxed_or_eos(
    candidates: Sequence[Candidate], _config: SamplingConfig, rng: np.random.Generator
) -> list[int]:
    admitted = [i for i, candidate in enumerate(candidates) if candidate.stop in (Stop.BOXED, Stop.EOS)]
    return rng.permutation(admitted).tolist()


def _longer(candidates: Sequence[Candidate], _config: SamplingConfig, rng: np.random.Generator) -> list[int]:
    return _weighted_order([len(candidate.log_probs) for candidate in candidates], rng)


def _boxed_long(
    candidates: Sequence[Candidate], config: SamplingConfig, rng: np.random.Generator
) -> list[int]:
    shortest = (config.fallback.min_windows or 1) * _window(config)
    admitted = [
        i
        for i, candidate in enumerate(candidates)
        if candidate.stop is Stop.BOXED and len(candidate.log_probs) >= shortest
    ]
    return rng.permutation(admitted).tolist()


def _weighted_order(weights: Sequence[float], rng: np.random.Generator) -> list[int]:
    """Drawn without replacement in proportion to the weights (Gumbel top-k), first drawn first."""
    scores = np.log(np.asarray(weights, dtype=np.float64)) + rng.gumbel(size=len(weights))
    return np.argsort(-scores, kind="stable").tolist()


def _cut_random(log_probs: np.ndarray, config: SamplingConfig, rng: np.random.Generator) -> int:
    window = _window(config)
    windows = -(-len(log_probs) // window)
    back = rng.integers(1, min(windows, config.fallback.max_windows or windows), endpoint=True)
    return (windows - int(back)) * window


def _cut_min_log_prob(log_probs: np.ndarray, _config: SamplingConfig, _rng: np.random.Generator) -> int:
    return int(np.argmin(log_probs))


def _cut_block(log_probs: np.ndarray, config: SamplingConfig, rng: np.random.Generator) -> int:
    starts = np.arange(0, len(log_probs), config.fallback.block_tokens)
    sizes = np.diff(starts, append=len(log_probs))
    means = np.add.reduceat(log_probs.astype(np.float64), starts) / sizes
    scores = means if config.fallback.cut == "inverse_block" else -means
    weights = np.exp(scores - scores.max())
    return int(rng.choice(starts, p=weights / weights.sum()))


def _cut_from_start(_log_probs: np.ndarray, _config: SamplingConfig, _rng: np.random.Generator) -> int:
    return 0


_Order = Callable[[Sequence[Candidate], SamplingConfig, np.random.Generator], list[int]]
_ORDERS: dict[str, _Order] = {
    "finished_strict": _finished_strict,
    "finished": _finished,
    "random": _random,
    "boxed_or_eos": _boxed_or_eos,
    "longer": _longer,
    "boxed_long": _boxed_long,
}

_Cut = Callable[[np.ndarray, SamplingConfig, np.random.Generator], int]
_CUTS: dict[str, _Cut] = {
    "random": _cut_random,
    "min_log_prob": _cut_min_log_prob,
    "block": _cut_block,
    "inverse_block": _cut_block,
    "from_start": _cut_from_start,
}
