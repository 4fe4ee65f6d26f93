"""Leaves of a cut compared with each other alone: parity with trees divided by hand, and unbiased values."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.support.naive_advantage import NAIVE, WHITENED
from tests.support.small_trees import config_of, random_batch, tree_of
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.learning.advantage import Advantages, estimate
from treepo.learning.cut_groups import Parts
from treepo.learning.estimators import ESTIMATORS, inverse_branching
from treepo.learning.forest import Forest
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rewards.grade import Grade
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.stopping import StopRule
from treepo.tree import PROMPT, Cut, Tree
from treepo.verdict import Verdict

TOLERANCE = 1e-10  # sums of a few dozen numbers near 1 in float64, in another order


def with_cuts(tree: Tree, rng: np.random.Generator) -> Tree:
    """The tree as if a cut had added some of the younger siblings, each cut one or more."""
    cuts = []
    for parent in (PROMPT, *range(len(tree.segments))):
        children = [index for index, segment in enumerate(tree.segments) if segment.parent == parent]
        while len(children) > 1 and rng.random() < 0.6:
            number = int(rng.integers(1, len(children)))
            cuts.append(Cut(parent, tuple(children[-number:]), leaf=None, leaves=0))
            children = children[:-number]
    return replace(tree, cuts=tuple(cuts))


def values_of(advantages: Advantages, leaf: int) -> np.ndarray:
    return advantages.value_M[slice(*advantages.forest.path_offset_L[leaf : leaf + 2])]


def divided_by_hand(tree: Tree) -> list[tuple[Tree, list[tuple[int, int]]]]:
    """A tree of each part's leaves alone, with each leaf's number and the steps above its part."""
    added = {segment: cut for cut in tree.cuts for segment in cut.segments}
    groups: dict[Cut | None, list[tuple[int, int]]] = {None: []}
    for number, leaf in enumerate(tree.leaves):
        path = tree.path(leaf.segment)
        above = max((step for step, segment in enumerate(path) if segment in added), default=0)
        groups.setdefault(added.get(path[above]), []).append((number, above))
    found = []
    for members in groups.values():
        below = {
            segment for number, above in members for segment in tree.path(tree.leaves[number].segment)[above:]
        }
        kept = sorted(below)
        place = {segment: index for index, segment in enumerate(kept)}
        segments = [
            replace(tree.segments[index], parent=place.get(tree.segments[index].parent, PROMPT))
            for index in kept
        ]
        leaves = [
            replace(tree.leaves[number], segment=place[tree.leaves[number].segment]) for number, _ in members
        ]
        if members:
            part = replace(tree, segments=tuple(segments), leaves=tuple(leaves), cuts=())
            found.append((part, members))
    return found


@pytest.mark.parametrize("leaf_weights", ["none", "inverse_branching"])
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in WHITENED])
def test_parts_are_trees_of_their_own(name: str, leaf_weights: str) -> None:
    rng = np.random.default_rng(5)
    config = config_of(estimator=name, leaf_weights=leaf_weights, cut_baselines=True)
    alone = compared = 0
    for tree in random_batch(rng, 40, ungraded=0.2, max_depth=4):
        tree = with_cuts(tree, rng)
        advantages = estimate([tree], config)
        for number, (part, members) in enumerate(divided_by_hand(tree)):
            expected = estimate([part], config_of(estimator=name, leaf_weights=leaf_weights))
            few = number > 0 and sum(leaf.reward is not None for leaf in part.leaves) < 2
            for index, (leaf, above) in enumerate(members):
                values = values_of(advantages, leaf)
                assert not values[:above].any()
                wanted = 0 * values[above:] if few else values_of(expected, index)
                np.testing.assert_allclose(values[above:], wanted, rtol=TOLERANCE, atol=TOLERANCE)
                weight = advantages.leaf_weight_L[leaf]
                assert weight == pytest.approx(expected.leaf_weight_L[index], rel=TOLERANCE)
                alone += few
                compared += number > 0 and not few
    assert alone > 10
    assert compared > 40


@pytest.mark.parametrize("name", sorted(WHITENED))
def test_only_what_a_cut_added_is_whitened(name: str) -> None:
    """Whitening sees the tokens below the cuts alone, so zeros above them shift nothing."""
    rng = np.random.default_rng(6)
    for tree in random_batch(rng, 20, least_leaves=6, max_depth=4):
        tree = with_cuts(tree, rng)
        advantages = estimate([tree], config_of(estimator=name, cut_baselines=True))
        forest = advantages.forest
        parts = Parts.of([tree], forest)
        counted = np.zeros(len(advantages.value_M), dtype=bool)
        counted[parts.step_M] = parts.compared_M
        tokens = np.repeat(advantages.value_M, forest.length_N[forest.path_node_M] * counted)
        assert not advantages.value_M[~counted].any()
        assert tokens.mean() == pytest.approx(0, abs=1e-9)
        assert np.std(tokens, ddof=1) == pytest.approx(1, abs=1e-6) or not tokens.any()


@pytest.mark.parametrize("name", sorted(NAIVE))
def test_without_cuts_nothing_changes(name: str) -> None:
    trees = random_batch(np.random.default_rng(7), 5, ungraded=0.2)
    plain, own = (estimate(trees, config_of(estimator=name, cut_baselines=flag)) for flag in (False, True))
    assert plain.value_M.tobytes() == own.value_M.tobytes()
    assert plain.leaf_weight_L.tobytes() == own.leaf_weight_L.tobytes()


def test_by_hand() -> None:
    """A wrong leaf (segment 1) was cut below segment 0; of its two continuations one is right."""
    tree = tree_of([-1, 0, 0, 0, -1], [0.0, 1.0, 0.0, 1.0])
    tree = replace(tree, cuts=(Cut(0, (2, 3), leaf=1, leaves=2),))
    advantages = estimate([tree], config_of(estimator="dr_grpo", cut_baselines=True))
    assert [values_of(advantages, leaf).tolist() for leaf in range(4)] == [
        [-0.5, -0.5],
        [0, 0.5],
        [0, -0.5],
        [0.5],
    ]


# A policy that can be enumerated: a response has up to 4 tokens of 2 to 4 and ends with token 0. It is right
# if its tokens sum to an even number; what comes next depends on the last token.
NEXT = {0: (0.1, 0.6, 0.3, 0.0), 2: (0.3, 0.2, 0.3, 0.2), 3: (0.2, 0.1, 0.2, 0.5), 4: (0.4, 0.3, 0.2, 0.1)}
TOKENS = (0, 2, 3, 4)
LONGEST = 4


def rewarded(response: tuple[int, ...]) -> float:
    return float(sum(response) % 2 == 0)


def value(response: tuple[int, ...]) -> float:
    """The mean reward of the policy's continuations, by enumeration."""
    if len(response) == LONGEST or (response and response[-1] == 0):
        return rewarded(response)
    chances = NEXT[response[-1] if response else 0]
    return math.fsum(p * value((*response, token)) for token, p in zip(TOKENS, chances, strict=True))


def answer(request: GenerateRequest) -> GenerateOutput:
    rng = np.random.default_rng(request.seed)
    tokens = request.context[request.prompt_tokens :].tolist()
    before = len(tokens)
    while len(tokens) - before < request.max_tokens and (not tokens or tokens[-1]):
        tokens.append(int(rng.choice(TOKENS, p=NEXT[tokens[-1] if tokens else 0])))
    new = np.array(tokens[before:], dtype=np.int32)
    return GenerateOutput(new, np.full(len(new), -1, np.float32), 0, "eos" if new[-1] == 0 else "length", 0)


def grow(config: SamplingConfig, index: int) -> Tree:
    prompt = Prompt(str(index), np.array([1], dtype=np.int32), "", "", "")
    tree = GrowingTree(prompt, config, StopRule(config, lambda _: ""), seed=1, step=0)
    while tree.path_requests:
        for path in tree.path_requests:
            while not path.complete:
                tree.receive(path, answer(tree.generate_request(path)))
            if path.stop is not None:
                reward = rewarded(tuple(path.context[1:].tolist()))
                tree.grade(path, Grade(reward, Verdict.CORRECT if reward else Verdict.WRONG))
        tree.advance()
    assert tree.grades is not None
    return tree.finished().graded([(grade.reward, grade.verdict) for grade in tree.grades])


@pytest.mark.parametrize("initial", [2, 3])
def test_the_parts_of_pivots_are_unbiased_where_the_tree_is_not(initial: int) -> None:
    """Against exact values. With leaf weights, a part's mean reward is an unbiased estimate of the policy's
    from where the part begins, though wrong answers were chosen to be cut.
    """
    config = SamplingConfig.model_validate(
        {
            "segment_tokens": 1,
            "max_depth": LONGEST,
            "max_response_tokens": LONGEST,
            "width": 10,
            "initial_branching": initial,
            "fallback": {"order": "wrong", "cut": "pivot"},
            "stops": {"boxed": "off", "repetition": {"check": "off"}},
        }
    )
    whole, first, cuts = [], [], []
    for index in range(1500):
        tree = grow(config, index)
        forest = Forest.of([tree])
        whole.append(float(forest.reward_L.mean()))
        parts = Parts.of([tree], forest).forest
        means = np.bincount(parts.tree_L, inverse_branching(parts) * parts.reward_L) / np.bincount(
            parts.tree_L
        )
        first.append(means[0])
        above = [
            ()
            if cut.parent == PROMPT
            else tuple(
                np.concatenate([tree.segments[each].tokens for each in tree.path(cut.parent)]).tolist()
            )
            for cut in tree.cuts
        ]
        # One number a tree, because the cuts of a tree are not independent.
        cuts.append(math.fsum(mean - value(place) for mean, place in zip(means[1:], above, strict=True)))
    exact = value(())
    for found, truth in ((first, exact), (cuts, 0.0)):
        error = float(np.std(found)) / math.sqrt(len(found))
        assert np.mean(found) == pytest.approx(truth, abs=5 * error)  # five standard errors of a mean
    error = float(np.std(whole)) / math.sqrt(len(whole))
    assert abs(np.mean(whole) - exact) > 10 * error  # the plain mean is biased
