"""Shared prefixes: with the plan, every token of a trie of contexts is computed once."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_rollout.shared_prefixes import PrefixPlan, plan_prefixes

Contexts = list[np.ndarray]


class NaiveCache:
    """A prefix cache: all prefixes of what was computed. computed: number of tokens so far."""

    def __init__(self, cached: Sequence[int] | np.ndarray = ()) -> None:
        self.known = {()}
        self.add(np.asarray(cached))
        self.computed = 0

    def add(self, tokens: np.ndarray) -> None:
        whole = tuple(tokens.tolist())
        self.known |= {whole[:length] for length in range(len(whole) + 1)}

    def compute(self, tokens: np.ndarray, at_least: int = 0) -> None:
        """at_least: number of last tokens that are computed even if they are cached."""
        whole = tuple(tokens.tolist())
        cached = len(whole) - at_least
        while whole[:cached] not in self.known:
            cached -= 1
        self.computed += len(whole) - cached


def run(plan: PrefixPlan, contexts: Contexts, cache: NaiveCache) -> None:
    """Compute the prefixes in the plan's order, and then all contexts at once."""
    for number, prefix in enumerate(plan.prefixes):
        assert prefix.after is None or prefix.after < number
        tokens = contexts[prefix.context][: prefix.length]
        cache.compute(tokens)
        cache.add(tokens)
    for context in contexts:
        cache.compute(context, at_least=1)


def naive_shared(contexts: Contexts) -> set[tuple[int, ...]]:
    """Every prefix that two or more contexts have above their last tokens, where they part or end."""
    counts = Counter(
        tuple(context[:length].tolist()) for context in contexts for length in range(1, len(context))
    )
    longer: dict[tuple[int, ...], list[int]] = {}
    for prefix, count in counts.items():
        longer.setdefault(prefix[:-1], []).append(count)
    return {prefix for prefix, count in counts.items() if count > 1 and count not in longer.get(prefix, [])}


def random_contexts(rng: np.random.Generator) -> Contexts:
    """Paths of random trees: equal ones, ones that continue others, ones that have nothing in common."""
    paths = [rng.integers(0, 3, rng.integers(1, 5)) for _ in range(rng.integers(1, 4))]
    for _ in range(rng.integers(0, 30)):
        path = paths[rng.integers(len(paths))]
        cut = rng.integers(1, len(path) + 1)
        paths.append(np.concatenate([path[:cut], rng.integers(0, 3, rng.integers(0, 6))]))
    return [np.asarray(paths[index], np.int32) for index in rng.permutation(len(paths))]


@pytest.mark.parametrize("seed", range(150))
def test_every_token_is_computed_once_and_in_few_rounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    contexts = random_contexts(rng)
    plan = plan_prefixes(contexts, shortest=1)
    cache = NaiveCache()
    run(plan, contexts, cache)
    heads = {tuple(context[:length].tolist()) for context in contexts for length in range(1, len(context))}
    assert cache.computed == len(heads) + len(contexts), "each head once, and each last token"
    assert max(rounds(plan), default=0) <= np.log2(len(contexts)) + 1
    shared = naive_shared(contexts)
    for prefix in plan.prefixes:
        assert tuple(contexts[prefix.context][: prefix.length].tolist()) in shared
    for context, needed in zip(contexts, plan.needed, strict=True):
        computed = needed_prefixes(plan, contexts, needed)
        ones = {prefix for prefix in shared if prefix == tuple(context[: len(prefix)].tolist())}
        assert {one for one in ones if len(one) < len(context)} <= computed


def rounds(plan: PrefixPlan) -> list[int]:
    """In which round each prefix is computed, from 1."""
    found: list[int] = []
    for prefix in plan.prefixes:
        found.append(1 if prefix.after is None else found[prefix.after] + 1)
    return found


def needed_prefixes(plan: PrefixPlan, contexts: Contexts, needed: int | None) -> set[tuple[int, ...]]:
    """All that is computed before a context that needs the prefix with this index."""
    found: set[tuple[int, ...]] = set()
    while needed is not None:
        prefix = plan.prefixes[needed]
        tokens = contexts[prefix.context]
        found |= {tuple(tokens[:length].tolist()) for length in range(1, prefix.length + 1)}
        needed = prefix.after
    return found


@pytest.mark.parametrize("seed", range(100))
def test_short_prefixes_are_left_out_and_cached_ones_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    contexts, shortest = random_contexts(rng), int(rng.integers(2, 5))
    cached = contexts[0][: rng.integers(0, len(contexts[0]) + 1)]

    def is_cached(prefix: np.ndarray) -> bool:
        return len(prefix) <= len(cached) and bool((cached[: len(prefix)] == prefix).all())

    plan, cache = plan_prefixes(contexts, shortest, is_cached), NaiveCache(cached)
    assert not any(is_cached(contexts[one.context][: one.length]) for one in plan.prefixes)
    run(plan, contexts, cache)
    whole = plan_prefixes(contexts, 1, is_cached)
    least = NaiveCache(cached)
    run(whole, contexts, least)
    assert len(plan.prefixes) <= len(whole.prefixes)
    # Each computation repeats fewer tokens than a planned prefix has.
    assert cache.computed - least.computed <= (shortest - 1) * (len(plan.prefixes) + len(contexts))


def test_contexts_that_share_too_little_need_no_plan() -> None:
    contexts = [np.array(tokens, np.int32) for tokens in ([1, 2, 3], [1, 2, 4], [5], [5], [6, 7])]
    assert plan_prefixes(contexts, 3) == PrefixPlan([], [None] * 5)
    assert len(plan_prefixes(contexts, 2).prefixes) == 1


def test_a_long_chain_is_computed_in_one_round() -> None:
    """A path with a branch at every segment: the longest prefix holds all the others."""
    trunk = np.arange(1000, dtype=np.int32)
    contexts = [np.append(trunk[:length], 5000).astype(np.int32) for length in range(100, 1000, 100)]
    contexts.append(np.append(trunk[:900], 5001).astype(np.int32))
    plan = plan_prefixes(contexts, 32)
    assert [(prefix.length, prefix.after) for prefix in plan.prefixes] == [(900, None)]
    assert plan.needed == [0] * len(contexts)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_any_contexts(tokens: Sequence[Sequence[int]]) -> None:
    contexts = [np.array(one, np.int32) for one in tokens]
    cache = NaiveCache()
    run(plan_prefixes(contexts, 1), contexts, cache)
    heads = {tuple(one[:length]) for one in tokens for length in range(1, len(one))}
    assert cache.computed == len(heads) + len(contexts)
