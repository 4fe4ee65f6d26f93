"""Decides how many children a tree step has, and which paths get them (paper, section 3; TreePO's code).

Pure functions of one prompt's state. The budgets and allocations themselves are in `policies`. Departures
from the official code: a range of initial branchings works; random factors are drawn for each tree; a token
budget belongs to one tree, so no tree depends on another (there, a rank's budget is divided by its live
prompts).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from treepo.config.sampling import AllocationConfig, SamplingConfig, bounds
from treepo.rollout.policies import ALLOCATIONS, BUDGETS, PLACES, ActivePaths


def initial_children(config: SamplingConfig, rng: np.random.Generator) -> int:
    """Children of the prompt at the first step, at most the least leaves of a tree.

    Under a token cap, a number drawn from a range is at most the segments that the cap pays for. A fixed
    number is not limited. Both are the official rules.
    """
    if config.tokens_per_step is not None:
        return min(config.tokens_per_step // config.segment_tokens, config.least_leaves)
    children = _draw(config.initial_branching, rng)
    if config.tree_response_tokens is not None and isinstance(config.initial_branching, str):
        children = min(children, config.tree_response_tokens // config.segment_tokens)
    return children


def branching_factor(config: SamplingConfig, rng: np.random.Generator) -> int:
    """Children of each path at one step; under `tokens_per_step`, of all paths together."""
    if config.tokens_per_step is not None:
        return config.tokens_per_step // config.segment_tokens
    return _draw(config.branching, rng)


def leaf_bound(config: SamplingConfig, width: int, finished: Sequence[int], active: Sequence[int]) -> int:
    """Most leaves that the tree may have in the end, between min_width and `width`.

    finished, active: lengths in tokens of the responses so far. Under a token cap, the tokens that are left
    are divided by the expected length of a response: the mean of the active ones after one more segment, or
    of the finished ones if no path is active.
    """
    if config.tree_response_tokens is None:
        return width
    left = max(config.tree_response_tokens - sum(finished), 0)
    lengths, further = (active, config.segment_tokens) if active else (finished, 0)
    affordable = int(left // (sum(lengths) / len(lengths) + further))
    return min(max(len(finished) + affordable, config.min_width), width)


def may_branch(config: SamplingConfig, tokens: int) -> bool:
    """Whether a path of `tokens` response tokens has the segments that `branch.from_depth` asks for."""
    return -(-tokens // config.segment_tokens) >= config.branch.from_depth


def place(config: SamplingConfig, last_segment: np.ndarray) -> int:
    """How many tokens of a path's last segment stay above the path's further children.

    last_segment: the segment's log-probs, float32 [T].
    """
    return PLACES[config.branch.at](last_segment, config.branch.window_tokens)


def step_budget(
    config: SamplingConfig, factor: int, bound: int, active: int, finished_now: int, finished: int
) -> int:
    """Children of all active paths together, at least one for each.

    bound: most leaves of the tree. finished_now: paths that ended in this step. finished: leaves of the tree
    so far, finished_now included.
    """
    wanted = BUDGETS[config.budget](factor, active, finished_now)
    return max(min(wanted, bound - finished), active)


def allocate[Path](
    config: SamplingConfig,
    budget: int,
    paths: Sequence[Path],
    log_probs: Callable[[Path], np.ndarray],
    step: int,
) -> list[int]:
    """Divide `budget` children among the active paths.

    log_probs: maps a path to the log-probs of its response, float32 [T]. step: the training step.
    """
    if budget == len(paths):
        return [1] * budget
    active = ActivePaths(
        count=len(paths),
        log_probs=lambda index: log_probs(paths[index]),
        segment_tokens=config.segment_tokens,
        temperature=allocation_temperature(config.allocation, step),
    )
    return ALLOCATIONS[config.allocation.policy](budget, active)


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
