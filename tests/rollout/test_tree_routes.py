"""The routes of a tree's tokens: each is that of the first request that read the token."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import numpy as np
import pytest

from tests.support.fake_engine import FakeEngine, SteadyEngine, decode, prompt_tokens, random_interruptions
from tests.support.sampling_policies import POLICIES, letters, sampling
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.driver import TreeDriver
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.stopping import StopRule
from treepo.routes import has_route
from treepo.tree import Finish, Tree, to_json

EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)


def model_of(policy: str) -> dict[str, Any]:
    """The chances of a `FakeEngine`, for many fallbacks."""
    return {"end": 0.12, "box": 0.02, "letters": letters(policy)}


@dataclass
class Reader(SteadyEngine):
    """Notes the routes that it returned for each prefix, by the prefix's tokens, in the order of requests."""

    read: dict[bytes, list[np.ndarray]] = field(default_factory=dict)

    def answer(self, request: GenerateRequest) -> GenerateOutput:
        output = super().answer(request)
        assert output.routes is not None
        assert request.routes_from is not None
        whole = np.concatenate([request.context, output.tokens])
        for index, route in enumerate(output.routes, start=request.routes_from):
            self.read.setdefault(whole[: index + 1].tobytes(), []).append(route)
        assert len(output.routes) == len(whole) - 1 - request.routes_from
        return output


def new_tree(policy: str, index: int, *, routes: bool = True) -> GrowingTree:
    config = sampling(**POLICIES[policy])
    prompt = Prompt(f"train:{index}", prompt_tokens(index), "", "", "")
    return GrowingTree(prompt, config, StopRule(config, decode), seed=7, step=0, routes=routes)


def grow(policy: str, engine: FakeEngine, index: int) -> tuple[Tree, list[GenerateRequest]]:
    """The tree, with the path requests of a round in their order, and what was asked."""
    tree, requests = new_tree(policy, index), []
    while tree.path_requests:
        for path in tree.path_requests:
            while not path.complete:
                requests.append(tree.generate_request(path))
                tree.receive(path, engine.answer(replace(requests[-1], seed=1000 * index + path.number)))
        tree.advance()
    return tree.finished(), requests


def own_prefixes(tree: Tree, segment: int) -> list[bytes]:
    """The tokens from the prompt's first to each token of a segment."""
    whole = np.concatenate([tree.prompt, *(tree.segments[at].tokens for at in tree.path(segment))])
    first = len(whole) - len(tree.segments[segment].tokens)
    return [whole[: end + 1].tobytes() for end in range(first, len(whole))]


def routes_above(tree: Tree, segment: int) -> np.ndarray:
    """Of the prompt and of all segments down to this one: [T, layers, k]."""
    routes = [tree.prompt_routes, *(tree.segments[at].routes for at in tree.path(segment))]
    return np.concatenate([each for each in routes if each is not None])


@EVERY_POLICY
@pytest.mark.parametrize("chance", [0.0, 0.5])
def test_every_token_has_the_route_of_its_first_reader(policy: str, chance: float) -> None:
    several, seen = 0, set()
    for index in range(12):
        engine = Reader(**model_of(policy), interruptions=random_interruptions(index, chance, longest=12))
        tree, _ = grow(policy, engine, index)
        nodes = Counter(prefix for at in range(len(tree.segments)) for prefix in own_prefixes(tree, at))
        for leaf in tree.leaves:
            whole = np.concatenate([tree.prompt, tree.response(leaf)])
            routes = routes_above(tree, leaf.segment)
            assert has_route(routes).tolist() == [True] * (len(whole) - 1) + [False]
            for length, route in enumerate(routes[:-1], start=1):
                read = engine.read[whole[:length].tobytes()]
                # Two siblings that begin with equal tokens are read by requests of their own.
                allowed = read if nodes[whole[:length].tobytes()] > 1 else read[:1]
                assert any(np.array_equal(route, one) for one in allowed)
                several += len({one.tobytes() for one in read}) > 1
        seen |= {segment.finish for segment in tree.segments}
    assert several, "some tokens were read by several requests, with other routes"
    assert Finish.CUT in seen or "unaligned" not in policy


@EVERY_POLICY
def test_only_the_first_request_asks_for_the_prompt(policy: str) -> None:
    engine = Reader(**model_of(policy), interruptions=random_interruptions(3, 0.5, longest=5))
    _, (first, *others) = grow(policy, engine, 3)
    assert first.routes_from == 0
    assert all(request.routes_from == len(request.context) - 1 for request in others)


def test_the_first_reader_of_a_prompt_of_one_token_is_the_first_request() -> None:
    trees: list[Tree] = []
    for reverse in (False, True):
        config = sampling()
        prompt = Prompt("p", prompt_tokens(0, length=1), "", "", "")
        tree = GrowingTree(prompt, config, StopRule(config, decode), seed=7, step=0, routes=True)
        engine = SteadyEngine(end=0.05)
        while tree.path_requests:
            for path in reversed(tree.path_requests) if reverse else tree.path_requests:
                while not path.complete:
                    asked = replace(tree.generate_request(path), seed=path.number)
                    tree.receive(path, engine.answer(asked))
            tree.advance()
        trees.append(tree.finished())
    assert to_json(trees[0], routes=True) == to_json(trees[1], routes=True)


@EVERY_POLICY
def test_the_order_of_answers_and_lost_requests_change_nothing(policy: str) -> None:
    config = sampling(**POLICIES[policy], attempts=9) if "attempts" not in POLICIES[policy] else sampling()
    prompts = [Prompt(f"train:{index}", prompt_tokens(index), "", "", "") for index in range(4)]

    async def trees_of(engine: FakeEngine) -> list[bytes]:
        driver = TreeDriver([engine, engine], config, decode, seed=7, routes=True)
        async with aclosing(driver.sample(prompts, step=0)) as results:
            trees = [result async for result in results if isinstance(result, Tree)]
        return sorted(to_json(tree, routes=True) for tree in trees)

    model = model_of(policy)
    plain = asyncio.run(trees_of(FakeEngine(**model)))
    assert len(plain) == len(prompts)
    assert b"prompt_routes" in plain[0]
    for shuffle in range(3):
        assert asyncio.run(trees_of(FakeEngine(**model, shuffle=shuffle))) == plain
    failing = FakeEngine(**model, shuffle=5, fails=lambda number, _: number % 4 == 1)
    assert asyncio.run(trees_of(failing)) == plain


def test_without_routes_nothing_is_asked_for_and_kept() -> None:
    tree = new_tree("paper", 0, routes=False)
    engine = SteadyEngine(end=0.05)
    while tree.path_requests:
        for path in tree.path_requests:
            while not path.complete:
                request = tree.generate_request(path)
                assert request.routes_from is None
                tree.receive(path, engine.answer(request))
        tree.advance()
    finished = tree.finished()
    assert finished.prompt_routes is None
    assert all(segment.routes is None for segment in finished.segments)


@pytest.mark.parametrize("found", [None, 11, 13])
def test_an_output_with_other_routes_than_asked_for_is_refused(found: int | None) -> None:
    tree = new_tree("paper", 0)
    path = tree.path_requests[0]
    output = SteadyEngine().answer(tree.generate_request(path))
    assert output.routes is not None
    assert len(output.routes) == 5 + 8 - 1
    routes = None if found is None else np.resize(output.routes, (found, 2, 3))
    expected = "no routes" if found is None else f"the routes of {found} tokens"
    with pytest.raises(EngineError, match=f"returned {expected}; those of 12 were requested"):
        tree.receive(path, replace(output, routes=routes))
    assert tree.receive(path, output) == 8


def test_a_tree_keeps_no_part_of_an_answer() -> None:
    """An answer that came through Ray stays in its store as long as a part of it is used."""
    interruptions: Iterator[int] = repeat(3)
    engine = Reader(**model_of("random, unaligned"), interruptions=interruptions)
    answers: list[GenerateOutput] = []
    tree = new_tree("random, unaligned", 1)
    while tree.path_requests:
        for path in tree.path_requests:
            while not path.complete:
                answers.append(engine.answer(tree.generate_request(path)))
                tree.receive(path, answers[-1])
        tree.advance()
    finished = tree.finished()
    kept = [finished.prompt_routes]
    for segment in finished.segments:
        kept += [segment.tokens, segment.log_probs, segment.routes]
    for one in kept:
        assert one is not None
        for answer in answers:
            assert not any(
                np.shares_memory(one, each)
                for each in (answer.tokens, answer.log_probs, answer.routes)
                if each is not None
            )
