"""Lookahead: its trees equal those of a naive version, which samples whole children and drops duplicates."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_engine import EOS, FakeEngine, SteadyEngine, decode, prompt_tokens
from tests.support.sampling_policies import sampling
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.protocols import GenerateRequest
from treepo.rollout.driver import TreeDriver
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.stopping import StopRule
from treepo.tree import PROMPT, Stop, Tree, from_json, to_json

SEGMENT, LONGEST, DEPTH = 8, 36, 5
# Nothing of these trees is drawn but tokens: a fallback begins again at the prompt.
FIXED: dict[str, Any] = {
    "max_response_tokens": LONGEST,
    "stops": {"boxed": "off", "repetition": {"check": "off"}},
    "fallback": {"order": "finished_strict", "cut": "from_start"},
}


def prompt(index: int) -> Prompt:
    return Prompt(f"train:{index}", prompt_tokens(index), "", "", "")


def grow(config: SamplingConfig, engine: FakeEngine, index: int = 0) -> GrowingTree:
    """Grow a tree. All requests of one path have the same seed."""
    tree = GrowingTree(prompt(index), config, StopRule(config, decode), seed=7, step=0)
    while tree.path_requests:
        for path in tree.path_requests:
            while not path.complete:
                request = tree.generate_request(path)
                tree.receive(path, engine.answer(replace(request, seed=1000 * index + path.number)))
        tree.advance()
    return tree


@dataclass
class Naive:
    """A path of the naive version: its segments, the draws of each, and the number that its tokens have."""

    segments: tuple[tuple[int, ...], ...] = ()
    draws: tuple[int, ...] = ()
    number: int = -1

    @property
    def tokens(self) -> tuple[int, ...]:
        return sum(self.segments, ())

    @property
    def stop(self) -> Stop | None:
        if self.tokens[-1] == EOS:
            return Stop.EOS
        if len(self.tokens) == LONGEST:
            return Stop.LIMIT
        return Stop.DEPTH if len(self.segments) == DEPTH else None


def naive_tree(
    config: SamplingConfig, sample: Callable[[tuple[int, ...], int], tuple[int, ...]]
) -> list[tuple[Naive, Stop | None]]:
    """The leaves in their order. sample: from the tokens above and a number, the next segment."""
    ahead = config.branch.lookahead
    leaves: list[Naive] = []
    places, numbers = [(Naive(), int(config.initial_branching))], 0
    while places:
        children: list[Naive] = []
        for above, count in places:
            begun: dict[tuple[int, ...], list[Naive]] = {}
            for number in range(numbers, numbers + count):
                segment = sample(above.tokens, number)
                child = Naive((*above.segments, segment), (*above.draws, 1), number)
                begun.setdefault(segment[:ahead] if count > 1 else (), []).append(child)
            children += [replace(alike[0], draws=(*above.draws, len(alike))) for alike in begun.values()]
            numbers += count
        saturated = len(leaves) + len(children) >= config.most_leaves
        while saturated and not all(child.stop for child in children):
            children = [
                child
                if child.stop
                else replace(
                    child,
                    segments=(*child.segments, sample(child.tokens, child.number)),
                    draws=(*child.draws, 1),
                )
                for child in children
            ]
        active = [child for child in children if not child.stop]
        before = len(leaves)
        leaves += [child for child in children if child.stop]
        rest, factor = config.most_leaves - len(leaves), int(config.branching)
        if active:
            budget = max(len(active), min(rest, factor * (len(active) + len(leaves) - before)))
            share, remainder = divmod(budget, len(active))
            places = [(path, share) for path in active[:-1]] + [(active[-1], share + remainder)]
        else:
            places = [(Naive(), min(rest, factor))] if rest else []
    return [(leaf, leaf.stop) for leaf in leaves]


@given(
    ahead=st.integers(1, SEGMENT - 1),
    branching=st.integers(1, 5),
    initial=st.integers(1, 6),
    width=st.integers(6, 14),
    letters=st.integers(1, 4),
    end=st.sampled_from([0.0, 0.05, 0.3]),
    index=st.integers(0, 10**6),
)
def test_a_tree_is_that_of_full_children_of_which_those_that_agree_are_dropped(
    ahead: int, branching: int, initial: int, width: int, letters: int, end: float, index: int
) -> None:
    config = sampling(
        **FIXED,
        branch={"lookahead": ahead},
        branching=branching,
        initial_branching=initial,
        width=width,
    )
    engine = SteadyEngine(end=end, letters=letters)
    tree = grow(config, engine, index)
    whole = tree.finished()

    def sample(above: tuple[int, ...], number: int) -> tuple[int, ...]:
        context = np.concatenate([prompt_tokens(index), np.array(above, dtype=np.int32)])
        most = min(SEGMENT, LONGEST - len(above))
        request = GenerateRequest(context, 5, most, 1.0, seed=1000 * index + number)
        return tuple(engine.answer(request).tokens.tolist())

    expected = naive_tree(config, sample)
    found = []
    for leaf in whole.leaves:
        path = [whole.segments[each] for each in whole.path(leaf.segment)]
        segments = tuple(tuple(segment.tokens.tolist()) for segment in path)
        found.append((segments, tuple(segment.draws for segment in path), leaf.stop))
    assert found == [(leaf.segments, leaf.draws, stop) for leaf, stop in expected]
    assert len(whole.leaves) == width
    assert to_json(from_json(to_json(whole))) == to_json(whole)


def beginnings(tree: Tree, ahead: int) -> dict[int, list[tuple[int, ...]]]:
    """The first tokens of each node's children that no fallback cut added."""
    added = {segment for cut in tree.cuts for segment in cut.segments}
    found: dict[int, list[tuple[int, ...]]] = {}
    for index, segment in enumerate(tree.segments):
        if index not in added:
            found.setdefault(segment.parent, []).append(tuple(segment.tokens[:ahead].tolist()))
    return found


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_two_siblings_begin_alike(ahead: int) -> None:
    """Neither those of one branching, nor those of one fallback cut."""
    config = sampling(branch={"lookahead": ahead}, branching=3, fallback={"order": "random"})
    compared = cut = 0
    for index in range(40):
        tree = grow(config, SteadyEngine(end=0.1, letters=3), index).finished()
        assert len(tree.leaves) == 12
        groups = list(beginnings(tree, ahead).values())
        for each in tree.cuts:
            assert {tree.segments[segment].parent for segment in each.segments} == {each.parent}
            groups.append([tuple(tree.segments[at].tokens[:ahead].tolist()) for at in each.segments])
            cut += len(each.segments) > 1
        for group in groups:
            assert len(set(group)) == len(group)
            compared += len(group) > 1
    assert compared > 40
    assert cut > 10


def test_draws_are_the_children_that_were_asked_for() -> None:
    """The draws of a place's children add up to the children that the branching asked for."""
    config = sampling(
        branch={"lookahead": 2}, branching=4, initial_branching=6, width=12, fallback={"cut": "none"}
    )
    several = 0
    for index in range(30):
        tree = grow(config, SteadyEngine(letters=2), index).finished()
        draws = [segment.draws for segment in tree.segments if segment.parent == PROMPT]
        assert sum(draws) == 6
        assert len(draws) <= 4  # of two letters
        several += max(draws) > 1
    assert several == 30


def test_a_model_that_knows_one_answer_still_gives_a_tree_of_full_width() -> None:
    """Every branching is given up but for one path; fallbacks add the leaves one by one."""
    tree = grow(sampling(branch={"lookahead": 2}), SteadyEngine(letters=1), index=3)
    whole = tree.finished()
    assert len(whole.leaves) == 12
    assert tree.pruned_tokens > 0
    assert whole.segments[0].draws == 2


def test_a_lookahead_waits_for_siblings_only_where_there_are_any() -> None:
    config = sampling(branch={"lookahead": 3}, initial_branching=4, width=4)
    engine = FakeEngine()
    driver = TreeDriver([engine], config, decode, seed=7)

    async def lengths() -> list[int]:
        async with aclosing(driver.sample([prompt(0)], 0)) as results:
            (tree,) = [result async for result in results]
        assert isinstance(tree, Tree)
        return [request.max_tokens for request in engine.requests]

    # Four children look ahead, fill their first segment, and run up to the limit: nothing branches again.
    assert sorted(asyncio.run(lengths())) == [3] * 4 + [5] * 4 + [32] * 4
    assert driver.stats.pruned_tokens == 0


@pytest.mark.parametrize("values", [{"mode": "sequential"}, {"initial_branching": 1, "branching": 1}])
def test_without_siblings_nothing_changes(values: dict[str, Any]) -> None:
    values = {**values, "fallback": {"cut": "none"}}
    if "branching" in values:
        values["width"] = 1
    ahead = sampling(**values, branch={"lookahead": 2})
    for index in range(5):
        one, other = (
            grow(config, FakeEngine(end=0.05, letters=2), index).finished()
            for config in (ahead, sampling(**values))
        )
        assert to_json(one) == to_json(other)


@pytest.mark.parametrize("ahead", [8, 9])
def test_a_lookahead_of_a_segment_or_more_is_refused(ahead: int) -> None:
    with pytest.raises(ValueError, match=f"lookahead = {ahead} is not less than segment_tokens = 8"):
        sampling(branch={"lookahead": ahead})
    assert sampling(branch={"lookahead": ahead}, mode="sequential").branch.lookahead == ahead
