"""Trees whose requests are interrupted anywhere: they are the uninterrupted trees, in all but versions."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import chain, cycle, repeat
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_engine import (
    FakeEngine,
    SteadyEngine,
    decode,
    log_probs_of,
    prompt_tokens,
    random_interruptions,
)
from tests.support.sampling_policies import POLICIES, letters, sampling
from tests.support.small_trees import config_of
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.learning.advantage import estimate
from treepo.learning.estimators import ESTIMATORS
from treepo.learning.packing import pack_flat, pack_trees
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.driver import TreeDriver
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.stopping import StopRule
from treepo.tree import PROMPT, Finish, Tree, Verdict, from_json, to_json

SEGMENT = 8  # tokens, as in `sampling`
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)
NEVER = repeat(0)


@dataclass
class Grown:
    """A tree, and what the router and the driver's counters read of it. requests: that were sent."""

    tree: Tree
    branchings: int
    fallbacks: int
    held: list[tuple[list[tuple[int, int]], int]]
    requests: list[GenerateRequest]


def model_of(policy: str) -> dict[str, Any]:
    """The chances of a `FakeEngine`."""
    return {"end": 0.04, "box": 0.02, "letters": letters(policy)}


def steady(policy: str, interruptions: Iterator[int] = NEVER) -> SteadyEngine:
    return SteadyEngine(**model_of(policy), interruptions=interruptions)


def grow(policy: str, engine: FakeEngine, index: int = 0) -> Grown:
    """Grow the tree of prompt `index`. All requests of one path have the same seed."""
    config = sampling(**POLICIES[policy])
    rule = StopRule(config, decode)
    prompt = Prompt(f"train:{index}", prompt_tokens(index), "", "", "")
    tree = GrowingTree(prompt, config, rule, seed=7, step=0)
    held, requests = [], []
    while tree.path_requests:
        for path in tree.path_requests:
            while not path.complete:
                requests.append(tree.generate_request(path))
                output = engine.answer(replace(requests[-1], seed=1000 * index + path.number))
                taken = tree.receive(path, output)
                assert 0 < taken <= len(output.tokens)
                assert engine.stop_rule is None or taken == len(output.tokens)
        held.append((tree.held(), tree.above()))
        tree.advance()
    return Grown(tree.finished(), tree.branchings, tree.fallbacks, held, requests)


def without_versions(tree: Tree) -> bytes:
    blank = (replace(segment, versions=np.zeros_like(segment.versions)) for segment in tree.segments)
    return to_json(replace(tree, segments=tuple(blank)))


def assert_same(plain: Grown, interrupted: Grown) -> None:
    assert without_versions(plain.tree) == without_versions(interrupted.tree)
    assert (plain.branchings, plain.fallbacks) == (interrupted.branchings, interrupted.fallbacks)
    assert plain.held == interrupted.held


def runs(tree: Tree) -> int:
    """The most runs of one version that a segment has."""
    return max(1 + int(np.count_nonzero(np.diff(segment.versions))) for segment in tree.segments)


@EVERY_POLICY
@pytest.mark.parametrize("stops_in_engine", [False, True])
def test_interruptions_after_every_length_change_nothing(policy: str, stops_in_engine: bool) -> None:
    rule = StopRule(sampling(**POLICIES[policy]), decode) if stops_in_engine else None
    for index in range(2):
        plain = grow(policy, steady(policy), index)
        for length in range(1, 2 * SEGMENT + 2):
            engine = SteadyEngine(**model_of(policy), stop_rule=rule, interruptions=repeat(length))
            interrupted = grow(policy, engine, index)
            assert_same(plain, interrupted)
            assert runs(interrupted.tree) >= min(SEGMENT // length, 2)


@EVERY_POLICY
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 40), min_size=1), index=st.integers(0, 9))
def test_random_interruptions_change_nothing(policy: str, lengths: list[int], index: int) -> None:
    plain = grow(policy, steady(policy), index)
    interrupted = grow(policy, steady(policy, cycle(lengths)), index)
    assert_same(plain, interrupted)
    tree = interrupted.tree
    for leaf in tree.leaves:
        whole = np.concatenate([tree.prompt, tree.response(leaf)])
        sampled = np.concatenate([tree.segments[at].log_probs for at in tree.path(leaf.segment)])
        np.testing.assert_array_equal(log_probs_of(whole)[len(tree.prompt) :], sampled)
    assert to_json(from_json(to_json(tree))) == to_json(tree)


@dataclass
class NumberingEngine(FakeEngine):
    """The log-prob of the n-th token that it samples is -n. sampled: each token, and the version it had."""

    sampled: list[tuple[int, int]] = field(default_factory=list)

    def answer(self, request: GenerateRequest) -> GenerateOutput:
        output = super().answer(request)
        numbers = np.arange(len(output.tokens), dtype=np.float32) + len(self.sampled)
        self.sampled += ((token, output.version) for token in output.tokens.tolist())
        return replace(output, log_probs=-numbers)


@EVERY_POLICY
def test_every_token_keeps_its_version_through_extensions_and_cuts(policy: str) -> None:
    model = {**model_of(policy), "end": 0.12}  # for many fallbacks
    seen: set[tuple[Finish, bool]] = set()
    for index in range(20):
        engine = NumberingEngine(**model, interruptions=random_interruptions(index, 0.9, longest=4))
        segments = grow(policy, engine, index).tree.segments
        numbers = [-int(number) for segment in segments for number in segment.log_probs]
        tokens = np.concatenate([segment.tokens for segment in segments]).tolist()
        versions = np.concatenate([segment.versions for segment in segments]).tolist()
        assert len(set(numbers)) == len(numbers)
        assert list(zip(tokens, versions, strict=True)) == [engine.sampled[number] for number in numbers]
        for segment in segments:
            above = segments[segment.parent].versions[-1] if segment.parent != PROMPT else 0
            assert (np.diff(segment.versions, prepend=above) >= 0).all(), "one engine's versions only rise"
            seen.add((segment.finish, segment.versions[0] != segment.versions[-1]))
    assert (Finish.LENGTH, True) in seen
    assert (Finish.CUT, True) in seen or "unaligned" not in policy


@EVERY_POLICY
def test_long_requests_begin_at_segment_boundaries(policy: str) -> None:
    """A path's segments are counted from where its path request began: after an unaligned cut, anywhere."""
    interruptions = 0
    for index in range(4):
        plain = grow(policy, steady(policy), index)
        starts = {request.context.tobytes() for request in plain.requests}
        grown = grow(policy, steady(policy, random_interruptions(index, 0.5, longest=20)), index)
        for request in grown.requests:
            if request.check_every:
                assert request.check_every == SEGMENT
                context = request.context
                assert any(
                    context[:length].tobytes() in starts for length in range(len(context), 4, -SEGMENT)
                )
            else:
                assert request.max_tokens <= SEGMENT
        interruptions += len(grown.requests) - len(plain.requests)
    assert interruptions > 0


@EVERY_POLICY
def test_segments_are_whole_wherever_their_path_was_cut(policy: str) -> None:
    for index in range(10):
        engine = steady(policy, random_interruptions(index, 0.5, longest=20))
        segments = grow(policy, engine, index).tree.segments
        parents = [segment.parent for segment in segments]
        cut = {parents.index(at) for at, segment in enumerate(segments) if segment.finish is Finish.CUT}
        assert max(len(segment.tokens) for segment in segments) <= SEGMENT
        for at in {*parents} - {PROMPT} - cut:
            assert segments[at].finish is Finish.CUT or len(segments[at].tokens) == SEGMENT


def output_of(request: GenerateRequest, tokens: int, finish: str) -> GenerateOutput:
    ids = np.arange(2, 2 + tokens, dtype=np.int32)
    return GenerateOutput(ids, -np.ones(tokens, np.float32), 0, finish, len(request.context))  # type: ignore[arg-type]  # of the parameters


@pytest.mark.parametrize(
    ("tokens", "finish", "fits"),
    [
        (0, "interrupted", False),
        (1, "interrupted", True),
        (5, "interrupted", True),
        (6, "interrupted", False),
        (4, "length", False),
        (5, "length", True),
        (4, "eos", True),
    ],
)
def test_an_output_must_fit_the_rest_of_the_segment(tokens: int, finish: str, fits: bool) -> None:
    config = sampling(mode="sequential", width=1)
    tree = GrowingTree(Prompt("p", prompt_tokens(0), "", "", ""), config, StopRule(config, decode), 7, 0)
    (path,) = tree.path_requests
    request = tree.generate_request(path)
    assert (request.max_tokens, request.check_every) == (40, SEGMENT)
    assert tree.receive(path, output_of(request, 11, "interrupted")) == 11
    request = tree.generate_request(path)
    assert (request.max_tokens, request.check_every, len(request.context)) == (5, 0, 5 + 11)
    if fits:
        assert tree.receive(path, output_of(request, tokens, finish)) == tokens
    else:
        with pytest.raises(EngineError, match=f"returned {tokens} tokens .* finish {finish}; 5 tokens were"):
            tree.receive(path, output_of(request, tokens, finish))
        assert path.length == 11


class OneAnswer(SteadyEngine):
    """Gives a prompt one answer, whatever the seeds of its requests."""

    def draw(self, request: GenerateRequest) -> tuple[np.ndarray, np.ndarray]:
        return super().draw(replace(request, seed=crc32(request.context[: request.prompt_tokens].tobytes())))


@EVERY_POLICY
def test_the_driver_grows_interrupted_trees_in_any_order_of_answers(policy: str) -> None:
    config = sampling(**POLICIES[policy])
    prompts = [Prompt(f"train:{index}", prompt_tokens(index), "", "", "") for index in range(8)]

    async def trees_of(engines: Sequence[FakeEngine]) -> tuple[list[Tree], TreeDriver]:
        driver = TreeDriver(engines, config, decode, seed=7)
        async with aclosing(driver.sample(prompts, step=0)) as results:
            trees = [result async for result in results if isinstance(result, Tree)]
        return sorted(trees, key=lambda tree: tree.prompt_id), driver

    def engine(seed: int, interruptions: Iterator[int]) -> OneAnswer:
        return OneAnswer(**model_of(policy), shuffle=seed, interruptions=interruptions)

    plain, _ = asyncio.run(trees_of([engine(3, NEVER)]))
    engines = [engine(seed, random_interruptions(seed, 0.5, longest=12)) for seed in range(2)]
    trees, driver = asyncio.run(trees_of(engines))
    assert len(plain) == len(prompts)
    assert list(map(without_versions, plain)) == list(map(without_versions, trees))
    assert max(map(runs, trees)) > 1
    kept = driver.stats.decoded_tokens - driver.stats.dropped_tokens - driver.stats.pruned_tokens
    assert kept == sum(tree.unique_tokens() for tree in trees)


@pytest.mark.parametrize("policy", ["paper", "random, unaligned", "sequential"])
def test_the_trainer_learns_the_same_but_for_versions(policy: str) -> None:
    def trees(interruptions: Iterator[int]) -> list[Tree]:
        rng = np.random.default_rng(3)
        grown = [grow(policy, steady(policy, interruptions), index).tree for index in range(4)]
        return [
            tree.graded([(float(reward), Verdict.CORRECT) for reward in rng.integers(0, 2, len(tree.leaves))])
            for tree in grown
        ]

    plain, interrupted = trees(NEVER), trees(random_interruptions(0, 0.6, longest=12))
    assert max(map(runs, interrupted)) > 1
    for estimator in ESTIMATORS:
        config = config_of(estimator=estimator)
        ours, theirs = estimate(plain, config), estimate(interrupted, config)
        np.testing.assert_array_equal(ours.value_M, theirs.value_M)
        for packer in (pack_trees, pack_flat):
            packs = packer(plain, ours, 60, 2), packer(interrupted, theirs, 60, 2)
            for one, other in zip(*map(chain.from_iterable, packs), strict=True):
                assert one.leaf_weight == other.leaf_weight
                columns = other.columns()
                for name, column in one.columns().items():
                    if name != "version":
                        np.testing.assert_array_equal(column, columns[name])
