"""Advantage estimators: parity with straight-line versions, trees computed by hand, invariances."""

import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.support.naive_advantage import (
    NAIVE,
    WHITENED,
    children_of,
    drawn_children,
    naive_estimate,
    rewards_below,
)
from tests.support.paths import ROOT
from tests.support.random_trees import with_draws
from tests.support.small_trees import config_of, random_batch, relabelled, tree_of, without_ungraded
from treepo.learning import estimators
from treepo.learning.advantage import Advantages, estimate
from treepo.learning.estimators import ESTIMATORS, Batch, inverse_branching
from treepo.learning.forest import Forest
from treepo.tree import PROMPT, Leaf, Tree, Verdict

# Sums of a few dozen numbers near 1 in float64, in another order; whitening divides by a deviation near 1.
TOLERANCE = 1e-10
ALGORITHM = ROOT / "docs" / "algorithm.md"
SHIFT_INVARIANT = sorted(set(ESTIMATORS) - {"reinforce_pp"})
TREEPO_OPTIONS = [
    dict(
        zip(
            ("weighting", "include_root", "drop_zero_std", "depth_count", "distinct_groups"),
            choice,
            strict=True,
        )
    )
    for choice in product(
        ("mean", "size"), (True, False), (True, False), ("per_leaf", "constant"), (True, False)
    )
]


def values_of(advantages: Advantages, tree: int, leaf: int) -> np.ndarray:
    index = advantages.forest.first_leaf_P[tree] + leaf
    return advantages.value_M[slice(*advantages.forest.path_offset_L[index : index + 2])]


@pytest.mark.parametrize(
    "options",
    [
        *({"estimator": name} for name in ESTIMATORS if name != "treepo"),
        {"estimator": "treepo_segment", "eta": 0.7},
        *TREEPO_OPTIONS,
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_estimator_equals_its_straight_line_version(options: dict[str, object]) -> None:
    config = config_of(**options)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        trees = random_batch(rng, 4, ungraded=0.2, max_depth=4)
        trees[2:] = [with_draws(tree, rng) for tree in trees[2:]]
        advantages = estimate(trees, config)
        expected = naive_estimate(trees, config)
        for number, tree in enumerate(trees):
            for index in range(len(tree.leaves)):
                values = values_of(advantages, number, index)
                wanted = expected.get((number, index), [0.0] * len(values))
                np.testing.assert_allclose(values, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_estimator_has_a_straight_line_version() -> None:
    assert set(ESTIMATORS) == set(NAIVE)


def test_an_estimator_is_added_as_documented() -> None:
    section = ALGORITHM.read_text().partition("### Adding an estimator\n")[2]
    example = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    before = set(ESTIMATORS)
    exec(example, vars(estimators).copy())
    (name,) = ESTIMATORS.keys() - before
    try:
        tree = tree_of([-1, -1], [1.0, -1.0])
        np.testing.assert_array_equal(unwhitened(tree, estimator=name), [0.0, -2.0])
        np.testing.assert_array_equal(estimate([tree], config_of(estimator=name)).value_M, [0.0, -2.0])
    finally:
        del ESTIMATORS[name]


# --- by hand -------------------------------------------------------------------------------------------


def unwhitened(tree: Tree, **options: object) -> np.ndarray:
    """The estimator's result before whitening."""
    config = config_of(**options)
    forest = Forest.of([tree])
    batch, estimator = Batch(forest, forest.graded_L.astype(float)), ESTIMATORS[config.estimator]
    return estimator.function(batch, **{name: getattr(config, name) for name in estimator.options})


def test_treepo_by_hand() -> None:
    # prompt -- 0 --+-- 1: +1        group means: prompt -1/3, segment 0: 0
    #          |    +-- 2: -1        segment 3 has one leaf and is no group
    #          +--- 3: -1
    tree = tree_of([-1, 0, 0, -1], [1.0, -1.0, -1.0])
    mean, inner = -1 / 3, 0.0
    by_groups = [(2 * 1 - mean - inner) / 2, (-2 - mean - inner) / 2, -1 - mean]
    np.testing.assert_allclose(unwhitened(tree), by_groups, atol=TOLERANCE)
    by_size = [(3 * (1 - mean) + 2 * 1) / 5, (3 * (-1 - mean) - 2) / 5, -1 - mean]
    np.testing.assert_allclose(unwhitened(tree, weighting="size"), by_size, atol=TOLERANCE)
    constant = [by_groups[0], by_groups[1], (-1 - mean) / 2]
    np.testing.assert_allclose(unwhitened(tree, depth_count="constant"), constant, atol=TOLERANCE)
    np.testing.assert_allclose(unwhitened(tree, include_root=False), [1.0, -1.0, 0.0], atol=TOLERANCE)


def test_spo_gives_good_siblings_of_a_good_parent_nothing() -> None:
    tree = tree_of([-1, -1, 0, 0, 1, 1], [1.0, 1.0, -1.0, -1.0])
    np.testing.assert_allclose(unwhitened(tree, estimator="spo"), [1, 0, 1, 0, -1, 0, -1, 0], atol=1e-6)


def test_a_chain_counts_its_one_group_once_if_asked() -> None:
    # Segments 0 and 1 are one chain: the group {2, 3} is on three nodes, prompt included.
    tree = tree_of([-1, 0, 1, 1, -1], [1.0, 0.0, 0.0])
    mean, pair = 1 / 3, 0.5
    repeated, once = unwhitened(tree), unwhitened(tree, distinct_groups=True)
    np.testing.assert_allclose(repeated[0], (3 - mean - 2 * pair) / 3, atol=TOLERANCE)
    np.testing.assert_allclose(once[0], (2 - mean - pair) / 2, atol=TOLERANCE)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("parents", [[-1], [-1, 0, 1, 2]], ids=["alone", "chain"])
def test_a_leaf_alone_has_no_baseline(name: str, parents: list[int]) -> None:
    """Its reward is its advantage; estimators that compare segments have nothing to compare."""
    expected = 0.0 if name in ("spo", "treepo_segment") else 0.7
    values = unwhitened(tree_of(parents, [0.7]), estimator=name)
    np.testing.assert_allclose(values, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
def test_equal_rewards_teach_nothing(name: str) -> None:
    rng = np.random.default_rng(0)
    (tree,) = random_batch(rng, 1, least_leaves=2)
    equal = replace(tree, leaves=tuple(replace(leaf, reward=0.25) for leaf in tree.leaves))
    # 0.25 and its small multiples are exact in binary, so means are too up to the rounding of a division.
    assert np.abs(estimate([equal], config_of(estimator=name)).value_M).max() < 1e-6


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_nothing_graded_gives_zeros_and_no_weight(name: str) -> None:
    advantages = estimate([tree_of([-1, 0, 0], [None, None])], config_of(estimator=name))
    assert not advantages.value_M.any()
    assert not advantages.token_weight_L.any()


# --- invariances ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("leaf_weights", ["none", "inverse_branching"])
def test_the_order_of_segments_leaves_and_trees_does_not_matter(name: str, leaf_weights: str) -> None:
    rng = np.random.default_rng(1)
    config = config_of(estimator=name, leaf_weights=leaf_weights)
    trees = random_batch(rng, 4, ungraded=0.1)
    changed, orders = zip(*(relabelled(tree, rng) for tree in reversed(trees)), strict=True)
    before, after = estimate(trees, config), estimate(changed, config)
    for number, order in enumerate(orders):
        for new, old in enumerate(order):
            np.testing.assert_allclose(
                values_of(after, number, new),
                values_of(before, len(trees) - 1 - number, old),
                atol=TOLERANCE,
            )


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
@pytest.mark.parametrize("leaf_weights", ["none", "inverse_branching"])
def test_a_constant_added_to_a_prompts_rewards_does_not_matter(name: str, leaf_weights: str) -> None:
    trees = random_batch(np.random.default_rng(2), 4, least_leaves=2)
    shifted = [
        tree.graded([(float(leaf.reward or 0) + 3.0 * number, Verdict.CORRECT) for leaf in tree.leaves])
        for number, tree in enumerate(trees)
    ]
    config = config_of(estimator=name, leaf_weights=leaf_weights)
    np.testing.assert_allclose(
        # GRPO and SPO divide by (deviation + epsilon): the shift's rounding is all that differs.
        estimate(shifted, config).value_M,
        estimate(trees, config).value_M,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("leaf_weights", ["none", "inverse_branching"])
def test_ungraded_leaves_are_as_if_never_sampled(name: str, leaf_weights: str) -> None:
    config = config_of(estimator=name, leaf_weights=leaf_weights)
    trees = random_batch(np.random.default_rng(3), 6, ungraded=0.4)
    pairs = [(tree, pruned) for tree in trees if (pruned := without_ungraded(tree)) is not None]
    assert any(len(tree.leaves) > len(pruned.leaves) for tree, pruned in pairs)
    full, alone = (estimate(batch, config) for batch in zip(*pairs, strict=True))
    for number, (tree, _) in enumerate(pairs):
        graded_places = [index for index, leaf in enumerate(tree.leaves) if leaf.reward is not None]
        for new, old in enumerate(graded_places):
            np.testing.assert_allclose(
                values_of(full, number, old), values_of(alone, number, new), atol=TOLERANCE
            )
    np.testing.assert_allclose(full.leaf_weight_L[full.leaf_weight_L > 0], alone.leaf_weight_L)


@pytest.mark.parametrize("name", sorted(WHITENED))
def test_whitening_spans_the_batchs_trained_tokens(name: str) -> None:
    trees = random_batch(np.random.default_rng(4), 5, ungraded=0.2)
    advantages = estimate(trees, config_of(estimator=name))
    tokens = [
        value
        for number, tree in enumerate(trees)
        for index, leaf in enumerate(tree.leaves)
        if leaf.reward is not None
        for value, node in zip(values_of(advantages, number, index), tree.path(leaf.segment), strict=True)
        for _ in tree.segments[node].tokens
    ]
    assert abs(np.mean(tokens)) < TOLERANCE
    assert np.var(tokens, ddof=1) == pytest.approx(1.0, abs=1e-6)  # epsilon in the divisor


def test_part_of_a_batch_keeps_its_values() -> None:
    trees = random_batch(np.random.default_rng(5), 5)
    whole = estimate(trees, config_of())
    part = whole.part(1, 4)
    for number in range(3):
        for index in range(len(trees[number + 1].leaves)):
            np.testing.assert_array_equal(values_of(part, number, index), values_of(whole, number + 1, index))
    assert len(part.token_weight_L) == sum(len(tree.leaves) for tree in trees[1:4])


# --- what the options promise --------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["mean", "size"])
def test_constant_depth_count_weighs_a_shared_token_by_its_value_over_its_ancestors(weighting: str) -> None:
    """Sum of A over the leaves S of a node = |S| / J x sum over proper ancestors a of (V(node) - V(a)), the
    ancestors weighted as the groups are: groups at the node and below cancel.
    """
    for seed in range(20):
        (tree,) = random_batch(np.random.default_rng(seed), 1, least_leaves=2)
        advantage_L = unwhitened(tree, depth_count="constant", weighting=weighting)

        def weight(node: int, tree: Tree = tree) -> float:
            size = len(rewards_below(tree, node))
            return (size if weighting == "size" else 1) * (node == PROMPT or size > 1)

        most = max(sum(map(weight, (PROMPT, *tree.path(leaf.segment)))) for leaf in tree.leaves)
        for node in range(len(tree.segments)):
            below = [index for index, leaf in enumerate(tree.leaves) if node in tree.path(leaf.segment)]
            value = np.mean(rewards_below(tree, node))
            gains = [
                weight(above) * (value - np.mean(rewards_below(tree, above)))
                for above in (PROMPT, *tree.path(node)[:-1])
            ]
            expected = len(below) / most * sum(gains)
            assert advantage_L[below].sum() == pytest.approx(expected, abs=TOLERANCE)


def test_with_the_official_divisor_terms_that_should_cancel_do_not() -> None:
    # The terms of the groups at segment 0 and below sum to 0 over its leaves, unless each leaf divides them
    # by a number of its own. Segment 0's value is the prompt's, so nothing else is left of the sum.
    tree = tree_of([-1, 0, 0, 2, 2, -1, -1], [1.0, -1.0, 0.0, 1.0, -1.0])
    assert unwhitened(tree, depth_count="constant")[:3].sum() == pytest.approx(0.0, abs=TOLERANCE)
    assert abs(unwhitened(tree)[:3].sum()) > 0.1


def test_inverse_branching_is_the_product_of_shares() -> None:
    rng = np.random.default_rng(6)
    trees = random_batch(rng, 4)
    trees += [with_draws(tree, rng) for tree in trees]
    weights = iter(inverse_branching(Forest.of(trees)).tolist())
    for tree in trees:
        for leaf in tree.leaves:
            share = math.prod(
                tree.segments[node].draws / len(drawn_children(tree, tree.segments[node].parent))
                for node in tree.path(leaf.segment)
            )
            assert next(weights) == pytest.approx(share * len(tree.leaves), rel=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["treepo", "spo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
)
def test_leaf_weights_enter_every_baseline(name: str) -> None:
    """By loops: every mean over leaves is weighted, and so is every deviation and the whitening."""
    for seed in range(5):
        trees = random_batch(np.random.default_rng(seed), 3, least_leaves=2, max_depth=4)
        advantages = estimate(trees, config_of(estimator=name, leaf_weights="inverse_branching"))
        weights = iter(inverse_branching(Forest.of(trees)).tolist())
        found, expected, token_weights = [], [], []
        for number, tree in enumerate(trees):
            weight = {leaf.segment: next(weights) for leaf in tree.leaves}
            for index, leaf in enumerate(tree.leaves):
                path = tree.path(leaf.segment)
                found += values_of(advantages, number, index).tolist()
                expected += weighted_advantages(name, tree, leaf, weight)
                token_weights += [weight[leaf.segment] * len(tree.segments[node].tokens) for node in path]
        if name in WHITENED:
            mean = np.average(expected, weights=token_weights)
            squares = np.dot(token_weights, (np.array(expected) - mean) ** 2)
            expected = (np.array(expected) - mean) / math.sqrt(squares / (sum(token_weights) - 1) + 1e-8)
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def weighted_advantages(name: str, tree: Tree, leaf: Leaf, weight: dict[int, float]) -> list[float]:
    """One advantage a segment of the leaf's path, before whitening. weight: each leaf's, by its segment."""

    def below(node: int) -> list[Leaf]:
        return [other for other in tree.leaves if node in (PROMPT, *tree.path(other.segment))]

    def mean(leaves: list[Leaf]) -> float:
        return float(
            np.average([x.reward or 0.0 for x in leaves], weights=[weight[x.segment] for x in leaves])
        )

    path, reward = tree.path(leaf.segment), leaf.reward or 0.0
    delta = reward - mean(below(PROMPT))
    if name == "spo":
        values = []
        for node in path:
            siblings = [mean(below(child)) for child in children_of(tree, tree.segments[node].parent)]
            values.append((mean(below(node)) - np.mean(siblings)) / (np.std(siblings) + 1e-8))
        return values
    if name == "treepo":
        groups = [group for node in (PROMPT, *path) if len(group := below(node)) > 1]
        delta = np.mean([reward - mean(group) for group in groups])
    elif name == "grpo":
        squares = sum(weight[x.segment] * ((x.reward or 0.0) - reward + delta) ** 2 for x in tree.leaves)
        delta /= math.sqrt(squares / (len(tree.leaves) - 1)) + 1e-6
    elif name == "rloo":
        delta = reward - mean([other for other in tree.leaves if other is not leaf])
    elif name == "reinforce_pp":
        delta = reward
    return [float(delta)] * len(path)


def sampled_tree(rng: np.random.Generator, width: int) -> Tree:
    """Paths end with probability 1/2 at each segment, and a path of n segments is right with probability
    0.9^(n^2): the policy's mean reward is sum over n of 2^-n 0.9^(n^2). Finished paths pass their budget on.
    """
    parents: list[int] = []
    rewards: dict[int, float] = {}
    active, depth, finished = [(PROMPT, width // 4)], 0, 0
    while active:
        depth += 1
        sampled = [(parent, child) for parent, children in active for child in range(children)]
        first = len(parents)
        parents += [parent for parent, _ in sampled]
        ends = rng.random(len(sampled)) < 0.5
        for index in np.flatnonzero(ends).tolist():
            rewards[first + index] = float(rng.random() < 0.9 ** (depth * depth))
        live = (first + np.flatnonzero(~ends)).tolist()
        ended, finished = int(ends.sum()), finished + int(ends.sum())
        budget = max(min(width - finished, 2 * ended + 2 * len(live)), len(live))
        extra = [budget - budget // len(live) * len(live)] if live else []
        active = [(node, budget // len(live)) for node in live]
        if extra:
            active[-1] = (active[-1][0], active[-1][1] + extra[0])
    return tree_of(parents, [rewards[index] for index in sorted(rewards)])


def test_inverse_branching_undoes_the_bias_of_budget_transfer() -> None:
    rng = np.random.default_rng(7)
    trees = [sampled_tree(rng, width=16) for _ in range(1200)]
    true = sum(0.5**n * 0.9 ** (n * n) for n in range(1, 60))
    forest = Forest.of(trees)
    plain = [np.mean(rewards_below(tree, PROMPT)) for tree in trees]
    weighted = np.bincount(forest.tree_L, inverse_branching(forest) * forest.reward_L) / np.bincount(
        forest.tree_L
    )
    error = np.std(weighted) / math.sqrt(len(trees))
    assert abs(np.mean(weighted) - true) < 4 * error  # four standard errors, of a fixed seed
    assert np.mean(plain) < true - 10 * error  # long paths have more leaves than their share


@pytest.mark.parametrize("normalisation", ["token_mean", "sequence_mean"])
def test_token_weights_sum_to_what_the_normalisation_counts(normalisation: str) -> None:
    trees = random_batch(np.random.default_rng(8), 3, ungraded=0.2)
    advantages = estimate(trees, config_of(normalisation=normalisation))
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    for (tree, leaf), weight in zip(leaves, advantages.token_weight_L, strict=True):
        if leaf.reward is None:
            assert weight == 0
        elif normalisation == "token_mean":
            assert weight == 1
        else:
            assert weight * len(tree.response(leaf)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "gpro"}, r"should be one of .*, found 'gpro'; did you mean 'grpo'\?"),
        ({"estimator": "grpo", "weighting": "size"}, "weighting = size with estimator = grpo: only treepo"),
        ({"eta": 0.5}, "eta = 0.5 with estimator = treepo: only treepo_segment"),
        ({"normalisation": "constant"}, "normalisation_tokens = None"),
        ({"normalisation_tokens": 7}, "normalisation_tokens = 7"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**options)


def test_spo_takes_the_mean_over_leaves_and_with_inverse_branching_over_children() -> None:
    """Without ungraded leaves; the naive version of tests/support takes the mean over leaves."""

    def mean_over_children(tree: Tree, node: int) -> float:
        below = [mean_over_children(tree, child) for child in children_of(tree, node)]
        return float(
            np.mean(below or [float(leaf.reward or 0) for leaf in tree.leaves if leaf.segment == node])
        )

    trees = random_batch(np.random.default_rng(8), 6, least_leaves=4)
    by_leaves = estimate(trees, config_of(estimator="spo"))
    by_children = estimate(trees, config_of(estimator="spo", leaf_weights="inverse_branching"))
    differences = []
    for number, tree in enumerate(trees):
        for index, leaf in enumerate(tree.leaves):
            expected = []
            for node in tree.path(leaf.segment):
                siblings = [
                    mean_over_children(tree, child) for child in children_of(tree, tree.segments[node].parent)
                ]
                deviation = float(np.std(siblings)) + estimators.SPO_EPSILON
                expected.append((mean_over_children(tree, node) - np.mean(siblings)) / deviation)
            # Both divide by (deviation + epsilon); where all siblings are equal, rounding is divided by 1e-8.
            np.testing.assert_allclose(values_of(by_children, number, index), expected, atol=1e-6)
            differences.append(np.abs(values_of(by_leaves, number, index) - expected).max())
    assert max(differences) > 0.1
