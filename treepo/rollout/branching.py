"""How many children a tree step has and which paths they go to (paper, section 3; TreePO's code).

Pure functions of one prompt's state. Departures from the official code: a range of initial branchings
works; `tokens` budgets are a tree's own instead of a rank's divided by its live prompts, so that no tree
depends on another; random factors are drawn for each tree.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from treepo.config.sampling import AllocationConfig, SamplingConfig, bounds


def initial_children(config: SamplingConfig, rng: np.random.Generator) -> int:
    """Children of the prompt at the first step, at most `width`."""
    if config.tokens_per_step is not None:
        return min(config.tokens_per_step // config.segment_tokens, config.width)
    return _draw(config.initial_branching, rng)


def branching_factor(config: SamplingConfig, rng: np.random.Generator) -> int:
    """Children for each path at one step, or under a `tokens` budget for all of them together."""
    if config.tokens_per_step is not None:
        return config.tokens_per_step // config.segment_tokens
    return _draw(config.branching, rng)


def leaf_bound(config: SamplingConfig, finished: Sequence[int], active: Sequence[int]) -> int:
    """Leaves that the tree may have in the end, given the lengths in tokens of the responses so far.

    Under a cap by tokens the rest of the budget buys responses as long as the active ones are after one
    more segment; without an active path, as long as the finished ones. Between min_width and width.
    """
    if config.tree_response_tokens is None:
        return config.width
    left = max(config.tree_response_tokens - sum(finished), 0)
    lengths, further = (active, config.segment_tokens) if active else (finished, 0)
    affordable = int(left // (sum(lengths) / len(lengths) + further))
    return min(max(len(finished) + affordable, config.min_width), config.width)


def step_budget(
    config: SamplingConfig, factor: int, bound: int, active: int, finished_now: int, finished: int
) -> int:
    """Children of all active paths together: at least one each.

    finished_now: paths that ended in this step; under `fixed` and `random` their share passes to the
    active ones. finished: leaves of the tree so far, finished_now included.
    """
    wanted = factor if config.budget == "tokens" else factor * (active + finished_now)
    return max(min(wanted, bound - finished), active)


def allocate[Path](
    config: SamplingConfig,
    budget: int,
    paths: Sequence[Path],
    log_probs: Callable[[Path], np.ndarray],
    step: int,
) -> list[int]:
    """Children of each active path, `budget` in total. log_probs: a path's response to float32 [T]."""
    allocation = config.allocation
    if budget == len(paths):
        return [1] * budget
    if allocation.policy == "average":
        share, remainder = divmod(budget, len(paths))
        return [share] * (len(paths) - 1) + [share + remainder]
    favour, statistic = allocation.policy.split("_")
    scores = np.array([_STATISTICS[statistic](log_probs(path), config.segment_tokens) for path in paths])
    if favour == "low":
        scores = -scores
    weights = np.exp((scores - scores.max()) / allocation_temperature(allocation, step))
    extra = largest_remainder(weights / weights.sum(), budget - len(paths))
    return [1 + share for share in extra]


def largest_remainder(weights: np.ndarray, total: int) -> list[int]:
    """`total` divided into whole shares in proportion to `weights` (which sum to 1); ties go to the first."""
    exact = weights * total
    shares = np.floor(exact).astype(int)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: total - shares.sum()]] += 1
    return shares.tolist()


def allocation_temperature(config: AllocationConfig, step: int) -> float:
    """Softmax temperature of the allocation at a training step (counted from 0)."""
    first, last, steps = config.temperature, config.final_temperature, config.schedule_steps
    if last is None or steps is None:
        return first
    progress = min(step / steps, 1.0)
    return (first + last) / 2 + (last - first) / 2 * math.sin(math.pi * (progress - 0.5))


def _draw(number_or_range: int | str, rng: np.random.Generator) -> int:
    low, high = bounds(number_or_range)
    return low if low == high else int(rng.integers(low, high, endpoint=True))


_STATISTICS: dict[str, Callable[[np.ndarray, int], float]] = {
    "sum": lambda path, _: float(path.sum(dtype=np.float64)),
    "mean": lambda path, _: float(path.mean(dtype=np.float64)),
    "last": lambda path, segment_tokens: float(path[-segment_tokens:].mean(dtype=np.float64)),
}
