"""Policies that read rewards: what is cut; each response is graded once, and no tree waits for another."""

import asyncio
from collections import Counter
from contextlib import aclosing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_engine import FakeEngine, decode, log_probs_of, prompt_tokens
from tests.support.fake_grader import FakeGrader, right
from tests.support.sampling_policies import sampling
from treepo.config.load import load_as
from treepo.config.rollout import RolloutConfig
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.errors import ConfigError, RewardError
from treepo.rewards.grade import Grade
from treepo.rollout.driver import FailedTree, TreeDriver
from treepo.rollout.fallback import cut_point
from treepo.rollout.policies import Candidate
from treepo.tree import PROMPT, Finish, Stop, Tree, from_json, to_json

PIVOTS = {"fallback": {"order": "wrong", "cut": "pivot"}}
UNALIGNED = {"fallback": {"order": "wrong", "cut": "min_log_prob", "aligned": False}}
LATE = {**PIVOTS, "branch": {"at": "surprise"}}


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"train:{i}", prompt_tokens(i), "", "", "") for i in range(count)]


def driver_of(config: SamplingConfig, grader: FakeGrader, engine: FakeEngine | None = None) -> TreeDriver:
    return TreeDriver([engine or FakeEngine(end=0.2)], config, decode, seed=7, grade=grader.grade)


def grow(config: SamplingConfig, grader: FakeGrader, engine: FakeEngine | None = None) -> list[Tree]:
    async def collect() -> list[Tree | FailedTree]:
        async with aclosing(driver_of(config, grader, engine).sample(prompts(20), step=0)) as results:
            return [result async for result in results]

    trees = asyncio.run(collect())
    assert all(isinstance(tree, Tree) for tree in trees)
    return sorted((tree for tree in trees if isinstance(tree, Tree)), key=lambda tree: tree.prompt_id)


@pytest.mark.parametrize("policy", [PIVOTS, UNALIGNED, LATE, {}])
@pytest.mark.parametrize("failing", [0, 4, 1])
def test_cuts_are_recorded_as_they_were_decided(policy: dict[str, object], failing: int) -> None:
    """The counts of right leaves are counted again, among those that were there before the cut."""
    grader = FakeGrader(failing)
    cuts = 0
    for tree in grow(sampling(**policy), grader):
        assert len(tree.leaves) == 12
        assert from_json(to_json(tree)).cuts == tree.cuts
        paths = [tree.path(leaf.segment) for leaf in tree.leaves]
        grades = [grader.verdict(tree.response(leaf)) for leaf in tree.leaves]
        place = {leaf.segment: number for number, leaf in enumerate(tree.leaves)}
        for cut in tree.cuts:
            cuts += 1
            below = [
                grade
                for path, grade in zip(paths[: cut.leaves], grades, strict=False)
                if cut.parent == PROMPT or cut.parent in path
            ]
            if policy:
                assert cut.graded == sum(grade.verdict.graded for grade in below)
                assert cut.right == sum(grade.reward == 1 for grade in below)
            else:
                assert (cut.right, cut.graded) == (None, None)
            if cut.leaf is not None and policy:
                assert grades[place[cut.leaf]].reward == 0
                assert cut.parent in [PROMPT, *paths[place[cut.leaf]]]
            if policy and failing == 1:
                assert (cut.parent, cut.leaf) == (PROMPT, None)  # no leaf was graded wrong
        added = [segment for cut in tree.cuts for segment in cut.segments]
        for leaf, path in zip(tree.leaves, paths, strict=True):
            # Tokens were sampled after exactly those above them: the fake's log-probs show it, bit for bit.
            whole = np.concatenate([tree.prompt, tree.response(leaf)])
            sampled = np.concatenate([tree.segments[index].log_probs for index in path])
            assert np.array_equal(log_probs_of(whole)[len(tree.prompt) :], sampled)
        assert len(set(added)) == len(added)
    assert cuts > 30


def test_segments_that_a_cut_added_and_another_split_are_still_known() -> None:
    split = 0
    for tree in grow(sampling(**UNALIGNED), FakeGrader()):
        added = [segment for cut in tree.cuts for segment in cut.segments]
        split += sum(tree.segments[segment].finish is Finish.CUT for segment in added)
    assert split > 5


@pytest.mark.parametrize("failing", [0, 4])
def test_every_response_is_graded_once(failing: int) -> None:
    grader = FakeGrader(failing)
    trees = grow(sampling(**PIVOTS), grader)
    responses = Counter(
        (tree.prompt_id, tree.response(leaf).tobytes()) for tree in trees for leaf in tree.leaves
    )
    assert grader.graded == responses


def test_the_grades_of_the_leaves_are_in_their_order() -> None:
    async def one() -> None:
        grader = FakeGrader()
        driver = driver_of(sampling(**PIVOTS), grader)
        live = driver.admit(prompts(1)[0], step=0)
        tree = await driver.grow(live)
        assert isinstance(tree, Tree)
        grades = live.tree.grades
        assert grades is not None
        assert [grade.reward for grade in grades] == [right(tree.response(leaf)) for leaf in tree.leaves]

    asyncio.run(one())


def test_policies_that_read_no_rewards_call_no_grader() -> None:
    grader = FakeGrader()
    grow(sampling(), grader)
    assert not grader.graded


def test_a_grader_that_hangs_delays_its_tree_alone() -> None:
    async def collect() -> list[Tree | FailedTree]:
        grader = FakeGrader(blocks=frozenset({"train:3"}))
        driver = driver_of(sampling(**PIVOTS, max_live_trees=2), grader)
        async with aclosing(driver.sample(prompts(8), step=0)) as results:
            first = [await anext(results) for _ in range(7)]
            grader.released.set()
            return [*first, await anext(results)]

    names = [tree.prompt_id for tree in asyncio.run(collect())]
    assert names[-1] == "train:3"
    assert sorted(names) == [f"train:{i}" for i in range(8)]


def test_a_tree_does_not_depend_on_the_order_of_answers_and_grades() -> None:
    plain = grow(sampling(**PIVOTS), FakeGrader())
    shuffled = grow(sampling(**PIVOTS), FakeGrader(), FakeEngine(end=0.2, shuffle=3))
    assert [to_json(tree) for tree in plain] == [to_json(tree) for tree in shuffled]


def test_an_error_of_the_grader_ends_the_sampling_and_leaves_nothing_running() -> None:
    class Broken(FakeGrader):
        async def grade(self, prompt: Prompt, response: np.ndarray) -> Grade:
            if len(self.graded) > 40:
                raise RewardError("the grader is broken on purpose")
            return await super().grade(prompt, response)

    async def collect() -> None:
        driver = driver_of(sampling(**PIVOTS), Broken())
        async with aclosing(driver.sample(prompts(20), step=0)) as results:
            async for _ in results:
                pass

    async def whole() -> None:
        with pytest.raises(ExceptionGroup) as raised:
            await collect()
        assert raised.group_contains(RewardError, match="broken on purpose")
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(whole())


@given(
    below=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_pivot_is_a_boundary_above_the_last_segment(below: list[tuple[int, int]], seed: int) -> None:
    counts = [(right, right + wrong) for right, wrong in below]
    boundaries = [8 * (place + 1) for place in range(len(below))]
    leaf = Candidate(Stop.EOS, np.zeros(boundaries[-1], np.float32), boundaries, right=False, below=counts)
    cut = cut_point(leaf, sampling(**PIVOTS), np.random.default_rng(seed))
    assert cut in boundaries[:-1] or (cut == 0 and len(boundaries) == 1)


def test_pivots_are_drawn_by_depth_and_recovery() -> None:
    below = [(3, 8), (3, 4), (0, 3), (0, 1)]
    leaf = Candidate(Stop.EOS, np.zeros(32, np.float32), [8, 16, 24, 32], right=False, below=below)
    rng, draws = np.random.default_rng(0), 6000
    drawn = Counter(cut_point(leaf, sampling(**PIVOTS), rng) for _ in range(draws))
    weights = {8: 8 * 4 / 10, 16: 16 * 4 / 6, 24: 24 * 1 / 5}
    for place, weight in weights.items():
        chance = weight / sum(weights.values())
        # Five standard deviations of a count of that many draws.
        assert abs(drawn[place] - draws * chance) < 5 * np.sqrt(draws * chance * (1 - chance))


def test_without_a_grader_they_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fallback\.order = wrong, fallback\.cut = pivot: .* a grader"):
        TreeDriver([FakeEngine()], sampling(**PIVOTS), decode, seed=0)
    needed = ["out=o", "model.path=m", "data.prompts=x.jsonl"]
    with pytest.raises(ConfigError, match=r"fallback\.order = wrong: only treepo train grades answers while"):
        load_as(RolloutConfig, None, [*needed, "sampling.fallback.order=wrong"])
    with pytest.raises(ValueError, match="aligned = false does nothing with cut = pivot"):
        sampling(fallback={"cut": "pivot", "aligned": False})


def test_sequential_sampling_and_estimates_read_no_rewards() -> None:
    assert sampling(**PIVOTS).reads_rewards == ["fallback.order = wrong", "fallback.cut = pivot"]
    assert sampling(mode="sequential", **PIVOTS).reads_rewards == []
    assert sampling(fallback={"order": "wrong", "cut": "none"}).reads_rewards == []
    assert sampling(**PIVOTS).without_rewards() == sampling()
    assert sampling(branching=3).without_rewards() == sampling(branching=3)
