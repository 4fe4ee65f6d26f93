"""The router: what a tree counts for, which engine admits it, and where it moves when its engine fails."""

import numpy as np
import pytest

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.router import LiveTree, RoutedEngine, Router
from treepo.rollout.stopping import StopRule

SAMPLING = SamplingConfig(segment_tokens=8, max_depth=5, width=12, max_response_tokens=40)
PROMPT_TOKENS, MOST = 5, 12 * 40


def tree(index: int = 0) -> GrowingTree:
    prompt = Prompt(str(index), prompt_tokens(index, PROMPT_TOKENS), "", "", "")
    return GrowingTree(prompt, SAMPLING, StopRule(SAMPLING, decode), seed=0, step=0)


def router_of(*kv_tokens: int, sampling: SamplingConfig = SAMPLING) -> Router:
    return Router([FakeEngine() for _ in kv_tokens], sampling, kv_tokens)


def admit(router: Router, engine: RoutedEngine, count: int) -> list[LiveTree]:
    return [router.admit(tree(index), engine) for index in range(count)]


def grow(router: Router, live: LiveTree, engine: FakeEngine, rounds: int = 100) -> None:
    """Grow the tree by some rounds, or to its end, as the driver does."""
    growing = live.tree
    for _ in range(rounds):
        for path in growing.path_requests:
            while not path.complete:
                router.count_tokens(growing.receive(path, engine.answer(growing.generate_request(path))))
            if path.stop is not None:
                router.leaf_ended(live)
        router.round_ended(live)
        growing.advance()
        if not growing.path_requests:
            router.remove(live)
            router.tree_finished(live)
            return


def held_by_hand(growing: GrowingTree) -> int:
    """Response tokens above the ends of the unfinished paths, each once."""
    responses = [path.context[PROMPT_TOKENS:] for path in growing.path_requests if path.stop is None]
    return len({response[:end].tobytes() for response in responses for end in range(1, len(response) + 1)})


def test_a_tree_counts_for_the_most_at_first_and_for_what_others_had_later() -> None:
    router = router_of(10_000)
    (routed,) = router.engines
    (first,) = admit(router, routed, 1)
    assert routed.expected_tokens == PROMPT_TOKENS + MOST
    grow(router, first, FakeEngine())
    assert routed.expected_tokens == 0
    # Without ends a tree holds (2 + 4 + 8 + 12 + 12) · 8 tokens when its last paths end.
    admit(router, routed, 2)
    assert routed.expected_tokens == 2 * (PROMPT_TOKENS + 304)


def test_a_tree_counts_for_less_as_its_leaves_end() -> None:
    router = router_of(10_000)
    (routed,) = router.engines
    for index in range(20):
        grow(router, router.admit(tree(index), routed), FakeEngine(end=0.05))
    (live,) = admit(router, routed, 1)
    expected = [live.expected_tokens]
    for leaves in range(12):
        router.leaf_ended(live)
        expected.append(live.expected_tokens)
        assert live.leaves == 11 - leaves
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] == PROMPT_TOKENS
    assert routed.expected_tokens == live.expected_tokens


def test_a_tree_larger_than_expected_counts_for_what_it_has() -> None:
    router = router_of(10_000)
    (routed,) = router.engines
    for index in range(20):
        grow(router, router.admit(tree(index), routed), FakeEngine(end=0.9))
    live = router.admit(tree(), routed)
    before = live.expected_tokens
    grow(router, live, FakeEngine(), rounds=3)
    assert live.expected_tokens == PROMPT_TOKENS + held_by_hand(live.tree) > before


@pytest.mark.parametrize("end", [0.0, 0.02, 0.1])
def test_what_an_engine_expects_is_the_sum_over_its_trees(end: float) -> None:
    router = router_of(3000, 3000, 3000)
    alive: list[LiveTree] = []
    generator = np.random.default_rng(0)
    for index in range(60):
        routed = router.engine_with_room(PROMPT_TOKENS)
        if routed is not None and len(alive) < 6:
            alive.append(router.admit(tree(index), routed))
        live = alive[generator.integers(len(alive))]
        if index % 5 == 0:
            router.move(live)
        grow(router, live, FakeEngine(end=end), rounds=1)
        alive = [live for live in alive if live.tree.path_requests]
        for routed in router.engines:
            assert routed.trees == {live for live in alive if live.home is routed}
            assert routed.expected_tokens == sum(live.expected_tokens for live in routed.trees)
            assert routed.leaves == sum(live.leaves for live in routed.trees)


def choice_by_hand(router: Router, max_trees: int | None) -> RoutedEngine | None:
    expected = router.expected_tree_tokens(PROMPT_TOKENS)
    with_room = []
    for routed in router.engines:
        room = routed.kv_tokens is None or routed.expected_tokens + expected <= routed.kv_tokens
        if max_trees is not None:
            room = len(routed.trees) < max_trees
        if room or not routed.trees:
            with_room.append(routed)
    return min(with_room, key=lambda routed: (routed.failures, routed.leaves), default=None)


@pytest.mark.parametrize("max_trees", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_a_loop_over_all_engines(max_trees: int | None, seed: int) -> None:
    sampling = SAMPLING.model_copy(update={"max_live_trees": max_trees})
    generator = np.random.default_rng(seed)
    kv_tokens = [None if size < 300 else int(size) for size in generator.integers(0, 2000, 12)]
    router = Router([FakeEngine() for _ in kv_tokens], sampling, kv_tokens)
    engine, alive = FakeEngine(end=0.1), []
    for index in range(150):
        routed = router.engine_with_room(PROMPT_TOKENS)
        assert routed is choice_by_hand(router, max_trees)
        if routed is not None and generator.random() < 0.7:
            alive.append(router.admit(tree(index), routed))
        router.engines[generator.integers(12)].failures = int(generator.integers(3)) // 2
        for live in generator.permutation(np.array([*alive, None], dtype=object))[:3]:
            if live is not None:
                if generator.random() < 0.2:
                    router.move(live)
                grow(router, live, engine, rounds=1)
        alive = [live for live in alive if live.tree.path_requests]


def test_each_engine_has_a_kv_cache_of_its_own() -> None:
    router = router_of(3 * (PROMPT_TOKENS + MOST), 500)
    large, small = router.engines
    admitted = []
    while (routed := router.engine_with_room(PROMPT_TOKENS)) is not None:
        admitted.append(routed)
        router.admit(tree(len(admitted)), routed)
    assert (admitted.count(large), admitted.count(small)) == (3, 1)


def test_an_engine_without_trees_admits_any_tree() -> None:
    router = router_of(10)
    (routed,) = router.engines
    assert router.engine_with_room(1000) is routed
    admit(router, routed, 1)
    assert router.engine_with_room(1) is None


def test_a_tree_moves_to_an_engine_with_room() -> None:
    router = router_of(2000, 500, 2000)
    failing, full, roomy = router.engines
    (live,) = admit(router, failing, 1)
    admit(router, full, 1)
    admit(router, roomy, 3)  # a larger load than the full one's
    failing.failures = 2
    router.move(live)
    assert live.home is roomy
    assert (failing.expected_tokens, failing.leaves) == (0, 0)


def test_a_tree_that_must_move_does_not_wait_for_room() -> None:
    router = router_of(2000, 500, 600)
    failing, one, other = router.engines
    (live,) = admit(router, failing, 1)
    admit(router, one, 2)
    admit(router, other, 1)
    router.move(live)
    assert live.home is other
    assert other.expected_tokens > 600
    failing.failures = 1
    assert router.engine_with_room(PROMPT_TOKENS) is failing  # no new tree joins the crowded ones


def test_the_number_of_trees_bounds_a_move_too() -> None:
    sampling = SAMPLING.model_copy(update={"max_live_trees": 2})
    router = router_of(10, 10, 10, sampling=sampling)
    failing, full, roomy = router.engines
    (live,) = admit(router, failing, 1)
    admit(router, full, 2)
    admit(router, roomy, 1)
    roomy.failures = 1
    router.move(live)
    assert live.home is roomy


def test_the_only_engine_keeps_its_trees() -> None:
    router = router_of(500)
    (live,) = admit(router, router.engines[0], 1)
    router.move(live)
    assert live.home is router.engines[0]
    assert router.engines[0].leaves == 12
