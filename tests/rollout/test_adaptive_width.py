"""A range of widths: a tree stops at the lower number if its leaves agree, and otherwise goes on."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from tests.support.fake_grader import FakeGrader
from tests.support.sampling_policies import sampling
from treepo.config.load import load_as
from treepo.config.rollout import RolloutConfig
from treepo.data.prompts import Prompt
from treepo.errors import ConfigError
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree, from_json, to_json


def grow(grader: FakeGrader, shuffle: int | None = None, **values: Any) -> list[Tree]:
    async def collect() -> list[Tree]:
        engine = FakeEngine(end=0.15, letters=6, shuffle=shuffle)
        driver = TreeDriver([engine], sampling(**values), decode, seed=3, grade=grader.grade)
        prompts = [Prompt(f"{i}", prompt_tokens(i), "", "", "") for i in range(30)]
        async with aclosing(driver.sample(prompts, step=0)) as results:
            trees = [tree async for tree in results if isinstance(tree, Tree)]
        assert driver.stats.failed_trees == 0
        return sorted(trees, key=lambda tree: tree.prompt_id)

    return asyncio.run(collect())


@pytest.mark.parametrize("failing", [0, 3, 1])
@pytest.mark.parametrize(
    "policy",
    [{}, {"mode": "sequential"}, {"fallback": {"order": "wrong", "cut": "pivot"}}],
    ids=["tree", "sequential", "pivots"],
)
def test_a_tree_goes_on_unless_its_first_leaves_agree(policy: dict[str, Any], failing: int) -> None:
    """Ungraded leaves count for nothing; of a tree with fewer than two graded leaves it is not known."""
    grader = FakeGrader(failing)
    stopped = went_on = 0
    for tree in grow(grader, width="3-9", **policy):
        rewards = [grader.verdict(tree.response(leaf)).reward for leaf in tree.leaves]
        first = [reward for reward in rewards[:3] if reward is not None]
        agree = len(first) > 1 and len(set(first)) == 1
        assert len(tree.leaves) == (3 if agree else 9)
        assert tree.agreed is agree is from_json(to_json(tree)).agreed
        stopped += agree
        went_on += not agree
    assert went_on > 5
    assert stopped > 3 or failing == 1


def test_until_it_goes_on_a_tree_is_the_narrow_one() -> None:
    narrow = {tree.prompt_id: tree for tree in grow(FakeGrader(), width=3)}
    for tree in grow(FakeGrader(), width="3-9"):
        if tree.agreed:
            # The narrow tree reads no rewards, so its record of cuts has no counts.
            same = narrow[tree.prompt_id]
            assert to_json(replace(tree, agreed=False, cuts=())) == to_json(replace(same, cuts=()))


def test_a_width_does_not_depend_on_the_order_of_answers_and_grades() -> None:
    plain = [to_json(tree) for tree in grow(FakeGrader(), width="3-9")]
    assert plain == [to_json(tree) for tree in grow(FakeGrader(), width="3-9", shuffle=5)]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"width": "4-16", "fallback": {"cut": "none"}}, "a tree goes on by falling back"),
        ({"width": "4-16", "cap": "response_tokens", "tree_response_tokens": 99}, "both bound the leaves"),
        ({"width": "4-16", "initial_branching": 5}, "is more than width = 4-16 allows, 4"),
        ({"width": "9-4"}, "neither a whole number from 1 nor a rising range"),
    ],
)
def test_ranges_that_cannot_work_are_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        sampling(**values)


def test_a_command_without_a_grader_refuses_a_range() -> None:
    needed = ["out=o", "model.path=m", "data.prompts=x.jsonl", "sampling.width=4-16"]
    with pytest.raises(ConfigError, match=r"width = 4-16: only treepo train grades answers while"):
        load_as(RolloutConfig, None, needed)
    assert sampling(width="4-9").without_rewards() == sampling(width=9)
