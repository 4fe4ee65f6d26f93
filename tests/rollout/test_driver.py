"""The driver on a fake engine: the content of trees, failing engines, and callers that stop early."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.support.fake_engine import EOS, FakeEngine, decode, log_probs_of, prompt_tokens
from tests.support.sampling_policies import POLICIES, letters, sampling
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.boxed import BoxScan
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.stats import Stats
from treepo.rollout.stopping import StopRule
from treepo.tree import PROMPT, Finish, Stop, Tree, from_json, to_json


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"train:{i}", prompt_tokens(i), "", "", "") for i in range(count)]


async def collect(driver: TreeDriver, count: int, step: int = 0) -> list[Tree | FailedTree]:
    async with aclosing(driver.sample(prompts(count), step)) as results:
        return [result async for result in results]


def grow(
    config: SamplingConfig, engines: Sequence[FakeEngine], count: int = 20, kv_tokens: int | None = None
) -> tuple[dict[str, Tree], TreeDriver]:
    """Grow trees, none of which may fail; returns them by prompt id."""
    driver = TreeDriver(engines, config, decode, seed=7, kv_tokens=kv_tokens)
    results = asyncio.run(collect(driver, count))
    trees = {result.prompt_id: result for result in results if isinstance(result, Tree)}
    assert len(trees) == len(results) == count
    return trees, driver


def same(one: dict[str, Tree], other: dict[str, Tree]) -> bool:
    return {name: to_json(tree) for name, tree in one.items()} == {
        name: to_json(tree) for name, tree in other.items()
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_every_tree_of_every_policy(policy: str) -> None:
    config = sampling(**POLICIES[policy])
    trees, driver = grow(config, [FakeEngine(end=0.04, box=0.02, letters=letters(policy))], count=12)
    rule = StopRule(config, decode)
    for tree in trees.values():
        assert len(tree.leaves) <= config.most_leaves
        if config.cap == "trajectories" and config.fallback.cut != "none":
            assert len(tree.leaves) == config.width
        for leaf in tree.leaves:
            path = tree.path(leaf.segment)
            # Tokens were sampled after exactly those above them: the fake's log-probs show it, bit for bit.
            whole = np.concatenate([tree.prompt, tree.response(leaf)])
            sampled = np.concatenate([tree.segments[index].log_probs for index in path])
            assert np.array_equal(log_probs_of(whole)[len(tree.prompt) :], sampled)
            ends = [tree.segments[index].finish is Finish.EOS for index in path]
            assert not any(ends[:-1])
            assert EOS not in tree.response(leaf)[:-1]
            assert len(tree.response(leaf)) <= config.max_response_tokens
            box = rule.scan(BoxScan(), tree.response(leaf))
            assert rule.classify(tree.response(leaf), box, ends[-1]) is leaf.stop
            assert max(len(tree.segments[index].tokens) for index in path) <= config.segment_tokens
        assert to_json(from_json(to_json(tree))) == to_json(tree)
    assert driver.stats.trees == len(trees)
    stats = driver.stats
    assert stats.decoded_tokens - stats.dropped_tokens - stats.pruned_tokens == sum(
        tree.unique_tokens() for tree in trees.values()
    )
    assert (stats.pruned_tokens > 0) == ("lookahead" in policy)


def test_unaligned_cuts_do_split_segments() -> None:
    trees, _ = grow(sampling(**POLICIES["random, unaligned"]), [FakeEngine(end=0.15)], count=40)
    cuts = 0
    for tree in trees.values():
        parents = [segment.parent for segment in tree.segments]
        for index, segment in enumerate(tree.segments):
            if segment.finish is Finish.CUT:
                cuts += 1
                assert parents.count(index) > 1
                rest = parents.index(index)
                assert len(segment.tokens) + len(tree.segments[rest].tokens) <= 8
    assert cuts > 5


def test_late_paths_do_not_branch_above_their_depth() -> None:
    trees, _ = grow(sampling(branch={"from_depth": 3}, fallback={"cut": "none"}), [FakeEngine(end=0.01)])
    branched = 0
    for tree in trees.values():
        parents = Counter(segment.parent for segment in tree.segments)
        assert parents.pop(PROMPT) == 2
        for index, children in parents.items():
            branched += children > 1
            assert children == 1 or len(tree.path(index)) >= 3
    assert branched > 20


def test_further_children_begin_before_the_least_likely_token() -> None:
    config = sampling(branch={"at": "surprise"}, fallback={"cut": "none"})
    trees, _ = grow(config, [FakeEngine(end=0.01)])
    cuts = 0
    for tree in trees.values():
        parents = [segment.parent for segment in tree.segments]
        for index, segment in enumerate(tree.segments):
            if segment.finish is Finish.CUT:
                cuts += 1
                lower = tree.segments[parents.index(index)]
                assert lower.log_probs[0] == min(*segment.log_probs, *lower.log_probs)
    assert cuts > 20


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tree_does_not_depend_on_the_order_of_answers(policy: str) -> None:
    config = sampling(**POLICIES[policy])
    model: dict[str, Any] = {"end": 0.04, "box": 0.02, "letters": letters(policy)}
    plain, _ = grow(config, [FakeEngine(**model)], count=8)
    engines = [FakeEngine(**model, shuffle=seed) for seed in (1, 2, 3)]
    shuffled, _ = grow(config, engines, count=8, kv_tokens=1000)
    assert same(plain, shuffled)


@pytest.mark.parametrize("policy", ["paper", "random, unaligned"])
def test_a_rule_in_the_engine_saves_tokens_and_changes_nothing(policy: str) -> None:
    config = sampling(**POLICIES[policy])
    without, wasteful = grow(config, [FakeEngine(end=0.06, box=0.03)])
    within, thrifty = grow(config, [FakeEngine(end=0.06, box=0.03, stop_rule=StopRule(config, decode))])
    assert same(without, within)
    assert wasteful.stats.dropped_tokens > 0
    assert thrifty.stats.dropped_tokens == 0


def test_a_path_that_an_engine_returns_early_goes_on() -> None:
    trees, driver = grow(sampling(), [FakeEngine(end=0.01, pause_after=1, caches=True)])
    for tree in trees.values():
        assert len(tree.leaves) == 12
        whole = [tuple(segment.tokens) for segment in tree.segments if len(segment.tokens) == 8]
        assert len(set(whole)) == len(whole)  # each with its own seed
    assert driver.stats.continuation_cached_tokens == driver.stats.continuation_tokens


def test_a_tree_is_determined_by_seed_step_and_prompt() -> None:
    config = sampling()

    def lines(seed: int, step: int) -> set[bytes]:
        results = asyncio.run(collect(TreeDriver([FakeEngine(end=0.04)], config, decode, seed), 5, step))
        return {to_json(result) for result in results if isinstance(result, Tree)}

    assert lines(1, 0) == lines(1, 0)
    assert not lines(1, 0) & lines(2, 0)
    assert not lines(1, 0) & lines(1, 1)


def test_after_saturation_a_path_is_one_request() -> None:
    config = sampling(width=4)
    _, driver = grow(config, [FakeEngine()], count=10)
    # Two children, then four that never branch again and run up to the limit.
    assert driver.stats.requests == 10 * (2 + 4)


def test_the_prefix_of_every_continuation_is_cached() -> None:
    config = sampling(**POLICIES["random, unaligned"])
    engines = [FakeEngine(end=0.05, caches=True), FakeEngine(end=0.05, caches=True, shuffle=3)]
    _, driver = grow(config, engines)
    assert driver.stats.cached_token_ratio == 1.0
    assert driver.stats.total_over_unique > 1.2


def test_a_tree_stays_on_its_engine_and_engines_share_the_work() -> None:
    engines = [FakeEngine(end=0.05, shuffle=seed) for seed in range(3)]
    trees, _ = grow(sampling(), engines, count=60)
    of_prompt = {tree.prompt.tobytes(): name for name, tree in trees.items()}
    homes = [
        {of_prompt[request.context[: request.prompt_tokens].tobytes()] for request in engine.requests}
        for engine in engines
    ]
    assert list(map(len, homes)) == [20, 20, 20]
    assert len(set.union(*homes)) == 60


@dataclass
class LiveCounter(FakeEngine):
    """Records the most prompts that had a running request at one time."""

    live: Counter[bytes] = field(default_factory=Counter)
    most: int = 0

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        name = request.context[: request.prompt_tokens].tobytes()
        self.live[name] += 1
        self.most = max(self.most, len(self.live))
        try:
            return await super().generate(request)
        finally:
            self.live[name] -= 1
            self.live += Counter()  # drops zeros


@pytest.mark.parametrize(("settings", "kv_tokens", "most"), [({"max_live_trees": 3}, None, 3), ({}, 700, 3)])
def test_live_trees_are_bounded(settings: dict[str, Any], kv_tokens: int | None, most: int) -> None:
    engine = LiveCounter(end=0.0, shuffle=1)
    # Without ends a tree holds (2 + 4 + 8 + 12 + 12) · 8 = 304 tokens below the 5 of its prompt. Until the
    # first tree is finished, a tree counts for 12 · 40 = 480, so the first has the engine to itself. Later
    # there is room for two, and for a third when the last paths of one come to their ends.
    grow(sampling(**settings), [engine], count=12, kv_tokens=kv_tokens)
    assert engine.most == most


def test_failed_requests_are_repeated_for_the_same_tree() -> None:
    config = sampling()
    calm, _ = grow(config, [FakeEngine(end=0.04)])
    shaky, driver = grow(config, [FakeEngine(end=0.04, fails=lambda number, _: number % 7 == 0)])
    assert same(calm, shaky)
    assert driver.stats.failed_requests > 20
    assert driver.stats.failed_trees == 0


def test_a_tree_leaves_an_engine_that_keeps_failing() -> None:
    broken, sound = FakeEngine(fails=lambda _number, _request: True), FakeEngine(end=0.04)
    calm, _ = grow(sampling(), [FakeEngine(end=0.04)])
    moved, _ = grow(sampling(), [broken, sound])
    assert same(calm, moved)


def test_one_sound_engine_of_three_is_found() -> None:
    broken = [FakeEngine(fails=lambda _number, _request: True) for _ in range(2)]
    calm, _ = grow(sampling(), [FakeEngine(end=0.04)])
    moved, _ = grow(sampling(), [*broken, FakeEngine(end=0.04)])
    assert same(calm, moved)


def test_a_tree_that_cannot_go_on_is_reported_and_the_others_go_on() -> None:
    bad = prompt_tokens(4)

    def fails(_number: int, request: GenerateRequest) -> bool:
        return len(request.context) > 5 and np.array_equal(request.context[:5], bad)

    driver = TreeDriver([FakeEngine(end=0.04, shuffle=2, fails=fails)], sampling(), decode, seed=7)
    results = asyncio.run(collect(driver, 10))
    failed = [result for result in results if isinstance(result, FailedTree)]
    assert [tree.prompt_id for tree in failed] == ["train:4"]
    assert "on purpose" in failed[0].reason
    assert "attempt 4 of 4" in failed[0].reason
    assert driver.stats.failed_trees == 1
    calm, _ = grow(sampling(), [FakeEngine(end=0.04)], count=10)
    sound = {result.prompt_id: result for result in results if isinstance(result, Tree)}
    del calm["train:4"]
    assert same(calm, sound)
    assert driver.pending() == []


def test_a_malformed_output_counts_as_a_failure() -> None:
    class Greedy(FakeEngine):
        def answer(self, request: GenerateRequest) -> GenerateOutput:
            output = super().answer(request)
            tokens = np.append(output.tokens, np.full(request.max_tokens, 9, np.int32))
            return GenerateOutput(tokens, log_probs_of(tokens), 0, "length", 0)

    driver = TreeDriver([Greedy()], sampling(), decode, seed=7)
    (result,) = asyncio.run(collect(driver, 1))
    assert isinstance(result, FailedTree)
    assert (
        "the engine returned 16 tokens with 16 log-probs, finish length; 8 tokens were requested"
        in result.reason
    )


def test_a_caller_may_stop_early() -> None:
    engine = FakeEngine(end=0.02, shuffle=5)
    driver = TreeDriver([engine], sampling(max_live_trees=6), decode, seed=7)
    asked = iter(prompts(1000))

    async def take_three() -> list[Tree | FailedTree]:
        taken = []
        async with aclosing(driver.sample(asked, 0)) as results:
            async for result in results:
                taken.append(result)
                if len(taken) == 3:
                    break
        assert engine.running == 0
        return taken

    assert len(asyncio.run(take_three())) == 3
    assert engine.cancelled > 0
    assert driver.pending() == []
    assert int(next(asked).id.split(":")[1]) < 30  # prompts are taken only when there is room
    # The driver can be used again.
    assert len(asyncio.run(collect(driver, 5))) == 5


@pytest.mark.filterwarnings("error:Exception ignored in. <coroutine:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_task_that_is_cancelled_before_it_begins_leaves_no_coroutine() -> None:
    async def cancel_at_once() -> None:
        driver = TreeDriver([FakeEngine()], sampling(), decode, seed=7)
        task = asyncio.create_task(driver.grow(driver.admit(prompts(1)[0], 1)))
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(cancel_at_once())


def test_pending_requests_are_listed() -> None:
    class Stuck(FakeEngine):
        async def generate(self, request: GenerateRequest) -> GenerateOutput:
            await asyncio.Event().wait()
            return await super().generate(request)

    driver = TreeDriver([Stuck()], sampling(), decode, seed=7)

    async def look() -> None:
        running = asyncio.create_task(collect(driver, 2))
        while len(driver.pending()) < 4:
            await asyncio.sleep(0)
        assert {(one.prompt_id, one.number, one.engine) for one in driver.pending()} == {
            ("train:0", 0, 0), ("train:0", 1, 0), ("train:1", 0, 0), ("train:1", 1, 0)
        }  # fmt: skip  # two prompts, a line
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(look())


def test_no_tree_waits_for_another() -> None:
    others_done = asyncio.Event()
    slow = prompt_tokens(0)

    class OneSlow(FakeEngine):
        async def generate(self, request: GenerateRequest) -> GenerateOutput:
            if np.array_equal(request.context[: request.prompt_tokens], slow):
                await others_done.wait()
            return await super().generate(request)

    async def names() -> list[str]:
        driver = TreeDriver([OneSlow(end=0.04)], sampling(), decode, seed=7)
        taken = []
        async with aclosing(driver.sample(prompts(10), 0)) as results:
            async for result in results:
                taken.append(result.prompt_id)
                if len(taken) == 9:
                    others_done.set()
        return taken

    assert asyncio.run(names())[-1] == "train:0"


def test_the_allocation_s_temperature_is_that_of_the_training_step() -> None:
    cooling = {
        "policy": "low_mean",
        "temperature": 1e6,
        "schedule": "sinusoidal",
        "final_temperature": 1e-6,
        "schedule_steps": 10,
    }
    config = sampling(allocation=cooling, initial_branching=3, branching=4)

    def most_grandchildren(step: int) -> int:
        (tree,) = asyncio.run(collect(TreeDriver([FakeEngine()], config, decode, seed=7), 1, step))
        assert isinstance(tree, Tree)
        return Counter(segment.parent for segment in tree.segments if segment.parent != PROMPT).most_common(
            1
        )[0][1]

    # Nine children beyond one for each of three paths: divided equally when hot, all for one path when cold.
    assert most_grandchildren(step=0) == 1 + 3
    assert most_grandchildren(step=10) == 1 + 9


def test_statistics_are_returned_once() -> None:
    _, driver = grow(sampling(), [FakeEngine(end=0.04)], count=5)
    taken = driver.take_stats()
    assert (taken.trees, taken.leaves, taken.failed_trees) == (5, 60, 0)
    assert taken.prompt_tokens > 0
    assert driver.take_stats() == Stats()


def test_sequential_samples_are_independent_of_each_other() -> None:
    config = sampling(mode="sequential", width=6)
    trees, driver = grow(config, [FakeEngine(end=0.03, stop_rule=StopRule(config, decode))], count=20)
    assert driver.stats.requests == 20 * 6
    for tree in trees.values():
        assert len(tree.leaves) == 6
        assert tree.unique_tokens() == tree.total_tokens()
        assert len({tree.path(leaf.segment)[0] for leaf in tree.leaves}) == 6
        assert {leaf.stop for leaf in tree.leaves} <= {Stop.EOS, Stop.LIMIT, Stop.BOXED}


def test_a_fault_in_the_product_is_not_a_failed_tree() -> None:
    class Faulty(FakeEngine):
        def answer(self, request: GenerateRequest) -> GenerateOutput:
            raise ZeroDivisionError(request.seed)

    with pytest.raises(ExceptionGroup, match="unhandled"):
        asyncio.run(collect(TreeDriver([Faulty()], sampling(), decode, seed=7), 3))
