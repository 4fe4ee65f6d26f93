"""Where trees live: what they count for, which engine gets them, where they go when one fails."""

import numpy as np
import pytest

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.router import Lane, Lanes, LiveTree
from treepo.rollout.stopping import StopRule

SAMPLING = SamplingConfig(segment_tokens=8, max_depth=5, width=12, max_response_tokens=40)
PROMPT_TOKENS, MOST = 5, 12 * 40


def tree(index: int = 0) -> GrowingTree:
    prompt = Prompt(str(index), prompt_tokens(index, PROMPT_TOKENS), "", "", "")
    return GrowingTree(prompt, SAMPLING, StopRule(SAMPLING, decode), seed=0, step=0)


def lanes(*capacities: int, sampling: SamplingConfig = SAMPLING) -> Lanes:
    return Lanes([FakeEngine() for _ in capacities], sampling, capacities)


def seat(where: Lanes, lane: Lane, count: int) -> list[LiveTree]:
    return [where.seat(tree(index), lane) for index in range(count)]


def grow(where: Lanes, live: LiveTree, engine: FakeEngine, rounds: int = 100) -> None:
    """Some rounds of the tree, or all of them, as the driver takes them."""
    growing = live.tree
    for _ in range(rounds):
        for ask in growing.asks:
            while not ask.complete:
                where.took(growing.receive(ask, engine.answer(growing.request(ask))))
            if ask.stop is not None:
                where.leaf_ended(live)
        where.round_ended(live)
        growing.advance()
        if not growing.asks:
            where.leave(live)
            where.finished(live)
            return


def held_by_hand(growing: GrowingTree) -> int:
    """Response tokens above the unfinished paths' ends, each once."""
    paths = [ask.context[PROMPT_TOKENS:] for ask in growing.asks if ask.stop is None]
    return len({path[:end].tobytes() for path in paths for end in range(1, len(path) + 1)})


def test_a_tree_counts_for_the_most_at_first_and_for_what_others_had_later() -> None:
    where = lanes(10_000)
    (lane,) = where.lanes
    (first,) = seat(where, lane, 1)
    assert lane.needed == PROMPT_TOKENS + MOST
    grow(where, first, FakeEngine())
    assert lane.needed == 0
    # Without ends a tree holds (2 + 4 + 8 + 12 + 12) · 8 tokens when its last paths end.
    seat(where, lane, 2)
    assert lane.needed == 2 * (PROMPT_TOKENS + 304)


def test_a_tree_counts_for_less_as_its_leaves_end() -> None:
    where = lanes(10_000)
    (lane,) = where.lanes
    for index in range(20):
        grow(where, where.seat(tree(index), lane), FakeEngine(end=0.05))
    (live,) = seat(where, lane, 1)
    needed = [live.needed]
    for leaves in range(12):
        where.leaf_ended(live)
        needed.append(live.needed)
        assert live.leaves == 11 - leaves
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] == PROMPT_TOKENS
    assert lane.needed == live.needed


def test_a_tree_larger_than_expected_counts_for_what_it_has() -> None:
    where = lanes(10_000)
    (lane,) = where.lanes
    for index in range(20):
        grow(where, where.seat(tree(index), lane), FakeEngine(end=0.9))
    live = where.seat(tree(), lane)
    expected = live.needed
    grow(where, live, FakeEngine(), rounds=3)
    assert live.needed == PROMPT_TOKENS + held_by_hand(live.tree) > expected


@pytest.mark.parametrize("end", [0.0, 0.02, 0.1])
def test_what_lanes_need_is_the_sum_over_their_trees(end: float) -> None:
    where = lanes(3000, 3000, 3000)
    alive: list[LiveTree] = []
    generator = np.random.default_rng(0)
    for index in range(60):
        lane = where.with_room(PROMPT_TOKENS)
        if lane is not None and len(alive) < 6:
            alive.append(where.seat(tree(index), lane))
        live = alive[generator.integers(len(alive))]
        if index % 5 == 0:
            where.move(live)
        grow(where, live, FakeEngine(end=end), rounds=1)
        alive = [live for live in alive if live.tree.asks]
        for lane in where.lanes:
            assert lane.trees == {live for live in alive if live.lane is lane}
            assert lane.needed == sum(live.needed for live in lane.trees)
            assert lane.leaves == sum(live.leaves for live in lane.trees)


def test_each_engine_has_its_own_capacity() -> None:
    where = lanes(3 * (PROMPT_TOKENS + MOST), 500)
    large, small = where.lanes
    seated = []
    while (lane := where.with_room(PROMPT_TOKENS)) is not None:
        seated.append(lane)
        where.seat(tree(len(seated)), lane)
    assert (seated.count(large), seated.count(small)) == (3, 1)


def test_a_tree_alone_has_room_whatever_it_needs() -> None:
    where = lanes(10)
    (lane,) = where.lanes
    assert where.with_room(1000) is lane
    seat(where, lane, 1)
    assert where.with_room(1) is None


def test_a_tree_moves_to_where_there_is_room() -> None:
    where = lanes(2000, 500, 2000)
    failing, full, roomy = where.lanes
    (live,) = seat(where, failing, 1)
    seat(where, full, 1)
    seat(where, roomy, 3)  # more of a burden than the full one
    failing.failures = 2
    where.move(live)
    assert live.lane is roomy
    assert (failing.needed, failing.leaves) == (0, 0)


def test_a_tree_that_must_leave_does_not_wait_for_room() -> None:
    where = lanes(2000, 500, 600)
    failing, one, other = where.lanes
    (live,) = seat(where, failing, 1)
    seat(where, one, 2)
    seat(where, other, 1)
    where.move(live)
    assert live.lane is other
    assert other.needed > 600
    failing.failures = 1
    assert where.with_room(PROMPT_TOKENS) is failing  # no new tree joins the crowded ones


def test_the_number_of_trees_bounds_a_move_too() -> None:
    sampling = SAMPLING.model_copy(update={"max_live_trees": 2})
    where = lanes(10, 10, 10, sampling=sampling)
    failing, full, roomy = where.lanes
    (live,) = seat(where, failing, 1)
    seat(where, full, 2)
    seat(where, roomy, 1)
    roomy.failures = 1
    where.move(live)
    assert live.lane is roomy


def test_the_only_engine_keeps_its_trees() -> None:
    where = lanes(500)
    (live,) = seat(where, where.lanes[0], 1)
    where.move(live)
    assert live.lane is where.lanes[0]
    assert where.lanes[0].leaves == 12
