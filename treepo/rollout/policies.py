"""The registered sampling policies: budgets, allocations, places, leaf orders and cut rules.

A policy is one short pure function. Its name is the value of a configuration key and its meaning is that
key's documentation, so a new policy touches this file and its test. `treepo.config.sampling` checks itself
against the registries; nothing of the configuration is imported here. `branching` and `fallback` apply the
policies.

Departure from the official code: `finished_strict` puts the best endings first (there, the worst).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from treepo.tree import Stop

# The official code's weights. Its 6 is for an answer that is started and left unclosed; no path ends so here.
_PRIORITY = {Stop.BOXED: 7, Stop.EOS: 5, Stop.DEPTH: 4, Stop.LIMIT: 3, Stop.REPETITION: 2}


class Registry[Policy]:
    """Policies by name, in the order of registration. reads_rewards: the names of the policies that need the
    rewards of a tree's leaves.
    """

    def __init__(self) -> None:
        self._policies: dict[str, Policy] = {}
        self._meanings: dict[str, str] = {}
        self.reads_rewards: set[str] = set()

    def register(self, name: str, meaning: str, *, reads_rewards: bool = False) -> Callable[[Policy], Policy]:
        """Decorator. meaning: one phrase for docs/configuration.md."""
        assert name not in self._policies, name

        def add(policy: Policy) -> Policy:
            self._policies[name], self._meanings[name] = policy, meaning
            if reads_rewards:
                self.reads_rewards.add(name)
            return policy

        return add

    def __getitem__(self, name: str) -> Policy:
        return self._policies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._policies)

    def describe(self) -> str:
        """Each name with its meaning, as one sentence."""
        return "; ".join(f"`{name}`: {meaning}" for name, meaning in self._meanings.items()) + "."


Budget = Callable[[int, int, int], int]
"""From (branching factor, active paths, paths that finished in this step) to the children of all paths."""

BUDGETS = Registry[Budget]()


@BUDGETS.register("fixed", "`branching` for each path that was active before the step")
def _for_each_path(factor: int, active: int, finished_now: int) -> int:
    """A path that finished in this step leaves its share to the active ones."""
    return factor * (active + finished_now)


BUDGETS.register("random", "the same, with `branching` drawn from its range at each step")(_for_each_path)


@BUDGETS.register("tokens", "`tokens_per_step` divided by segment_tokens")
def _for_all_paths(factor: int, active: int, finished_now: int) -> int:  # noqa: ARG001 - the signature of a budget
    return factor


@dataclass(frozen=True, slots=True, eq=False)
class ActivePaths:
    """The paths that an allocation divides children among.

    log_probs: from a path's index to the log-probs of its response, float32 [T]. segment_tokens: most tokens
    in one segment. temperature: of a softmax over the paths.
    """

    count: int
    log_probs: Callable[[int], np.ndarray]
    segment_tokens: int
    temperature: float


Allocation = Callable[[int, ActivePaths], list[int]]
"""From (children of all active paths, paths) to the children of each path, at least one."""

ALLOCATIONS = Registry[Allocation]()


@ALLOCATIONS.register("average", "the same for each, and the remainder to the last path")
def _average(budget: int, paths: ActivePaths) -> list[int]:
    share, remainder = divmod(budget, paths.count)
    return [share] * (paths.count - 1) + [share + remainder]


def _softmax_allocation(sign: int, statistic: Callable[[np.ndarray, int], float]) -> Allocation:
    """One child for each path, the rest by a softmax of `sign` times a statistic of the path's log-probs."""

    def allocation(budget: int, paths: ActivePaths) -> list[int]:
        values = [statistic(paths.log_probs(path), paths.segment_tokens) for path in range(paths.count)]
        logits = sign * np.array(values)
        weights = np.exp((logits - logits.max()) / paths.temperature)
        extra = largest_remainder(weights / weights.sum(), budget - paths.count)
        return [1 + share for share in extra]

    return allocation


def largest_remainder(weights: np.ndarray, total: int) -> list[int]:
    """Divide `total` into whole shares in proportion to `weights`, which sum to 1; ties go to the first."""
    exact = weights * total
    shares = np.floor(exact).astype(int)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: total - shares.sum()]] += 1
    return shares.tolist()


_STATISTICS: dict[str, tuple[Callable[[np.ndarray, int], float], str]] = {
    "sum": (lambda path, _: float(path.sum(dtype=np.float64)), "log-prob of the response"),
    "mean": (lambda path, _: float(path.mean(dtype=np.float64)), "mean log-prob of the response"),
    "last": (
        lambda path, segment_tokens: float(path[-segment_tokens:].mean(dtype=np.float64)),
        "mean log-prob of the last segment_tokens tokens",
    ),
}

for _name, (_statistic, _words) in _STATISTICS.items():
    for _favoured, _sign in (("low", -1), ("high", 1)):
        ALLOCATIONS.register(f"{_favoured}_{_name}", f"favours a {_favoured} {_words}")(
            _softmax_allocation(_sign, _statistic)
        )


Place = Callable[[np.ndarray, int], int]
"""How many tokens of a path's last segment stay above its further children, from the segment's log-probs
(float32 [T]) and the size of a window in tokens."""

PLACES = Registry[Place]()


@PLACES.register("end", "at its end")
def _at_end(log_probs: np.ndarray, _window: int) -> int:
    return len(log_probs)


@PLACES.register("surprise", "before the `window_tokens` tokens of it that are least likely together")
def _at_surprise(log_probs: np.ndarray, window: int) -> int:
    """-log p of a sampled token is an unbiased estimate of the entropy of the distribution it is from; the
    mean over a window estimates that of its places.
    """
    size = min(window, len(log_probs))
    sums = np.cumsum(np.concatenate([[0.0], log_probs.astype(np.float64)]))
    return int(np.argmin(sums[size:] - sums[:-size]))


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A finished leaf that a fallback may continue.

    log_probs: float32 [T] of its response. boundaries: ascending lengths in tokens at which the segments of
    its path end, its own end included. right: whether it is; None if it has no grade, or policies read none.
    below: of the leaves below each boundary, how many are right and how many are graded.
    """

    stop: Stop
    log_probs: np.ndarray
    boundaries: Sequence[int]
    right: bool | None = None
    below: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class FallbackSizes:
    """Sizes that leaf orders and cut rules read.

    window, block: tokens. max_windows: random cuts lie within this many windows of the end; None: anywhere.
    min_windows: windows that a leaf must have for `boxed_long`.
    """

    window: int
    block: int
    max_windows: int | None
    min_windows: int


LeafOrder = Callable[[Sequence[Candidate], FallbackSizes, np.random.Generator], list[int]]
"""Indices of the leaves to continue, first to last; leaves that the order does not admit are left out."""

ORDERS = Registry[LeafOrder]()


@ORDERS.register("finished_strict", "by how they ended: boxed, eos, depth, limit, repetition")
def _finished_strict(
    candidates: Sequence[Candidate], _sizes: FallbackSizes, _rng: np.random.Generator
) -> list[int]:
    return sorted(range(len(candidates)), key=lambda index: -_PRIORITY[candidates[index].stop])


@ORDERS.register("finished", "drawn with the weights 7, 5, 4, 3, 2 for those endings")
def _finished(candidates: Sequence[Candidate], _sizes: FallbackSizes, rng: np.random.Generator) -> list[int]:
    return _weighted_order([_PRIORITY[candidate.stop] for candidate in candidates], rng)


@ORDERS.register("random", "all of them, shuffled")
def _random(candidates: Sequence[Candidate], _sizes: FallbackSizes, rng: np.random.Generator) -> list[int]:
    return rng.permutation(len(candidates)).tolist()


@ORDERS.register("boxed_or_eos", "only those that ended with a box or the end of sequence, shuffled")
def _boxed_or_eos(
    candidates: Sequence[Candidate], _sizes: FallbackSizes, rng: np.random.Generator
) -> list[int]:
    admitted = [i for i, candidate in enumerate(candidates) if candidate.stop in (Stop.BOXED, Stop.EOS)]
    return rng.permutation(admitted).tolist()


@ORDERS.register("longer", "drawn with the response's length as weight")
def _longer(candidates: Sequence[Candidate], _sizes: FallbackSizes, rng: np.random.Generator) -> list[int]:
    return _weighted_order([len(candidate.log_probs) for candidate in candidates], rng)


@ORDERS.register("boxed_long", "only boxed ones of at least `min_windows` windows, shuffled")
def _boxed_long(candidates: Sequence[Candidate], sizes: FallbackSizes, rng: np.random.Generator) -> list[int]:
    shortest = sizes.min_windows * sizes.window
    admitted = [
        i
        for i, candidate in enumerate(candidates)
        if candidate.stop is Stop.BOXED and len(candidate.log_probs) >= shortest
    ]
    return rng.permutation(admitted).tolist()


@ORDERS.register("wrong", "only the wrong ones, shuffled", reads_rewards=True)
def _wrong(candidates: Sequence[Candidate], _sizes: FallbackSizes, rng: np.random.Generator) -> list[int]:
    admitted = [i for i, candidate in enumerate(candidates) if candidate.right is False]
    return rng.permutation(admitted).tolist()


def _weighted_order(weights: Sequence[float], rng: np.random.Generator) -> list[int]:
    """Draw without replacement in proportion to the weights (Gumbel top-k), first drawn first."""
    keys = np.log(np.asarray(weights, dtype=np.float64)) + rng.gumbel(size=len(weights))
    return np.argsort(-keys, kind="stable").tolist()


CutRule = Callable[[Candidate, FallbackSizes, np.random.Generator], int]
"""How many tokens of a leaf's response stay above the cut."""

CUTS = Registry[CutRule]()


@CUTS.register("random", "at a random window boundary")
def _cut_at_random(leaf: Candidate, sizes: FallbackSizes, rng: np.random.Generator) -> int:
    windows = -(-len(leaf.log_probs) // sizes.window)
    back = rng.integers(1, min(windows, sizes.max_windows or windows), endpoint=True)
    return (windows - int(back)) * sizes.window


@CUTS.register("min_log_prob", "at the least likely token")
def _cut_at_least_likely(leaf: Candidate, _sizes: FallbackSizes, _rng: np.random.Generator) -> int:
    return int(np.argmin(leaf.log_probs))


@CUTS.register("block", "at the start of a block drawn by softmax of its negative mean log-prob")
def _cut_at_unlikely_block(leaf: Candidate, sizes: FallbackSizes, rng: np.random.Generator) -> int:
    return _cut_at_block(-1, leaf.log_probs, sizes, rng)


@CUTS.register("inverse_block", "the same with the positive mean log-prob")
def _cut_at_likely_block(leaf: Candidate, sizes: FallbackSizes, rng: np.random.Generator) -> int:
    return _cut_at_block(1, leaf.log_probs, sizes, rng)


@CUTS.register("from_start", "at the prompt, for one leaf")
def _cut_at_prompt(_leaf: Candidate, _sizes: FallbackSizes, _rng: np.random.Generator) -> int:
    return 0


@CUTS.register(
    "pivot", "at a segment boundary, drawn by depth and the share of right leaves below", reads_rewards=True
)
def _cut_at_pivot(leaf: Candidate, _sizes: FallbackSizes, rng: np.random.Generator) -> int:
    """In proportion to (tokens above) x (right leaves below + 1) / (graded leaves below + 2): depth, and the
    chance of recovery under a uniform prior. 0 if the leaf has one segment.
    """
    places = np.array(leaf.boundaries[:-1], dtype=np.int64)
    if not len(places):
        return 0
    right, graded = np.array(leaf.below[:-1], dtype=np.float64).T
    weights = places * (right + 1) / (graded + 2)
    return int(rng.choice(places, p=weights / weights.sum()))


def _cut_at_block(sign: int, log_probs: np.ndarray, sizes: FallbackSizes, rng: np.random.Generator) -> int:
    starts = np.arange(0, len(log_probs), sizes.block)
    lengths = np.diff(starts, append=len(log_probs))
    logits = sign * np.add.reduceat(log_probs.astype(np.float64), starts) / lengths
    weights = np.exp(logits - logits.max())
    return int(rng.choice(starts, p=weights / weights.sum()))
