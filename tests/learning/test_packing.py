"""Packs: no token is lost or trained twice, and every token sees exactly its own path."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import chain, combinations

import numpy as np
import pytest

from tests.support.routed_trees import random_routes, with_given_routes
from tests.support.small_trees import config_of, random_batch, relabelled, tree_of, without_ungraded
from treepo.learning.advantage import Advantages, estimate
from treepo.learning.forest import Forest
from treepo.learning.packing import (
    Pack,
    blank_pack,
    head,
    pack_flat,
    pack_trees,
    padded,
    split_mini_batches,
)
from treepo.routes import no_route
from treepo.tree import PROMPT, Tree

Packer = Callable[..., list[list[Pack]]]
PACKERS = pytest.mark.parametrize("packer", [pack_trees, pack_flat])
SHAPES = [
    {},  # branching, equal siblings, leaves at every depth
    {"max_depth": 12, "max_children": 1},  # chains
    {"max_tokens": 1, "max_depth": 7},  # one-token segments
    {"max_depth": 7, "max_tokens": 3},  # hundreds of leaves: far over the budget
]
SUMS = ("advantage_pos", "advantage_neg", "count_pos", "count_neg")
TOLERANCE = 1e-12  # sums of a few hundred float64 numbers near 1, in another order


def batches() -> Iterator[tuple[list[Tree], Advantages]]:
    """Yield batches of every shape, with an estimator whose advantages differ along a path."""
    for seed, shape in enumerate(SHAPES):
        trees = random_batch(np.random.default_rng(seed), 4, ungraded=0.15, **shape)
        yield trees, estimate(trees, config_of(estimator="treepo_segment", normalisation="sequence_mean"))


def longest(trees: Sequence[Tree]) -> int:
    return max(len(tree.prompt) + len(tree.response(leaf)) for tree in trees for leaf in tree.leaves)


def budgets(trees: Sequence[Tree]) -> list[int]:
    """From the least that can work, which splits every large tree, to one pack for everything."""
    least = longest(trees)
    return [least, 2 * least, sum(len(tree.prompt) + tree.unique_tokens() for tree in trees)]


def tokens_of(packs: Sequence[Sequence[Pack]]) -> Iterator[tuple[Pack, int]]:
    for pack in chain.from_iterable(packs):
        for index in range(len(pack)):
            yield pack, index


def path_of(pack: Pack, index: int) -> list[int]:
    """The token and its ancestors from the prompt down, found by `source` alone."""
    path = []
    while index != -1:
        path.append(index)
        index = int(pack.source[index])
    return path[::-1]


def expected_sums(trees: Sequence[Tree], advantages: Advantages) -> dict[tuple[int, int], np.ndarray]:
    """Map (tree, segment) to the four sums of its tokens, by loops over leaves and paths."""
    sums: dict[tuple[int, int], np.ndarray] = {}
    leaf_index = 0
    for number, tree in enumerate(trees):
        for leaf in tree.leaves:
            values = advantages.value_M[slice(*advantages.forest.path_offset_L[leaf_index : leaf_index + 2])]
            weight = advantages.token_weight_L[leaf_index]
            leaf_index += 1
            if leaf.reward is None:
                continue
            for segment, value in zip(tree.path(leaf.segment), values, strict=True):
                entry = sums.setdefault((number, segment), np.zeros(4))
                entry[0 if value >= 0 else 1] += weight * value
                entry[2 if value >= 0 else 3] += weight
    return sums


@PACKERS
def test_every_token_is_trained_once_for_every_leaf_below_it(packer: Packer) -> None:
    context_tokens = 0
    for trees, advantages in batches():
        expected = {
            (number, segment, offset): sums
            for (number, segment), sums in expected_sums(trees, advantages).items()
            for offset in range(len(trees[number].segments[segment].tokens))
        }
        for budget in budgets(trees):
            found: dict[tuple[int, int, int], np.ndarray] = {}
            times: dict[tuple[int, int, int], int] = {}
            packs = packer(trees, advantages, budget, 2)
            for pack, i in tokens_of(packs):
                sums = np.array([getattr(pack, name)[i] for name in SUMS])
                if sums[2:].any():
                    key = (int(pack.tree[i]), int(pack.segment[i]), int(pack.offset[i]))
                    found[key] = found.get(key, np.zeros(4)) + sums
                    times[key] = times.get(key, 0) + 1
                else:
                    assert not sums.any()
                    context_tokens += pack.segment[i] != PROMPT
            assert found.keys() == expected.keys()
            for key, sums in found.items():
                np.testing.assert_allclose(sums, expected[key], rtol=TOLERANCE, atol=TOLERANCE)
            if packer is pack_trees:
                assert set(times.values()) == {1}
            weights = [pack.leaf_weight for replica in packs for pack in replica]
            assert sum(weights) == pytest.approx(advantages.leaf_weight_L.sum(), rel=TOLERANCE)
    assert (context_tokens > 0) == (packer is pack_trees)  # some trees were split


@PACKERS
def test_every_token_sees_exactly_its_own_path(packer: Packer) -> None:
    for trees, advantages in batches():
        for budget in budgets(trees):
            for pack, i in tokens_of(packer(trees, advantages, budget, 2)):
                seen = np.flatnonzero((np.arange(len(pack)) <= i) & (i < pack.exit))
                np.testing.assert_array_equal(seen, path_of(pack, i))
                assert pack.position[i] == len(seen) - 1
                tree, segment = trees[pack.tree[i]], int(pack.segment[i])
                above = [tree.segments[node].tokens for node in tree.path(segment)[:-1]]
                own = tree.prompt if segment == PROMPT else tree.segments[segment].tokens
                own = own[: pack.offset[i] + 1]
                context = own if segment == PROMPT else np.concatenate([tree.prompt, *above, own])
                np.testing.assert_array_equal(pack.token[seen], context)


@PACKERS
def test_a_token_keeps_what_its_segment_says(packer: Packer) -> None:
    for trees, advantages in batches():
        for pack, i in tokens_of(packer(trees, advantages, longest(trees), 1)):
            if pack.segment[i] == PROMPT:
                assert (pack.rollout_log_prob[i], pack.version[i]) == (0, -1)
            else:
                segment = trees[pack.tree[i]].segments[pack.segment[i]]
                assert pack.rollout_log_prob[i] == segment.log_probs[pack.offset[i]]
                assert pack.version[i] == segment.versions[pack.offset[i]]


@PACKERS
def test_the_graded_leaves_come_back_from_the_packs(packer: Packer) -> None:
    for trees, advantages in batches():
        pruned = {number: tree for number, full in enumerate(trees) if (tree := without_ungraded(full))}
        wanted = sorted(
            (number, *tree.prompt.tolist(), *tree.response(leaf).tolist())
            for number, tree in pruned.items()
            for leaf in tree.leaves
        )
        found = []
        leaf_segments = {
            (number, leaf.segment)
            for number, tree in enumerate(trees)
            for leaf in tree.leaves
            if leaf.reward is not None
        }
        for pack, i in tokens_of(packer(trees, advantages, longest(trees), 3)):
            number, segment = int(pack.tree[i]), int(pack.segment[i])
            if number < 0 or (number, segment) not in leaf_segments:
                continue
            ends_here = pack.offset[i] + 1 == len(trees[number].segments[segment].tokens)
            if ends_here and pack.count_pos[i] + pack.count_neg[i]:
                found.append((number, *pack.token[path_of(pack, i)].tolist()))
        assert sorted(found) == wanted


@PACKERS
def test_packs_keep_to_the_budget_and_replicas_are_balanced(packer: Packer) -> None:
    for trees, advantages in batches():
        for budget in budgets(trees):
            for replicas in (1, 2, 5):
                packs = packer(trees, advantages, budget, replicas)
                assert len(packs) == replicas
                assert all(replica for replica in packs)
                assert max(len(pack) for replica in packs for pack in replica) <= budget
                loads = [sum(len(pack) for pack in replica) for replica in packs]
                # No replica is ahead of another by more than one piece.
                assert max(loads) - min(loads) <= min(budget, largest_piece(packer, trees))


def largest_piece(packer: Packer, trees: Sequence[Tree]) -> int:
    """Tokens of the largest tree or trajectory, of which one replica may have one more than another."""
    if packer is pack_flat:
        return longest(trees)
    return max(len(tree.prompt) + tree.unique_tokens() for tree in trees)


def test_whole_trees_that_fit_one_pack_share_one() -> None:
    for trees, advantages in batches():
        (packs,) = pack_trees(trees, advantages, budgets(trees)[-1], 1)
        graded = [pruned for tree in trees if (pruned := without_ungraded(tree))]
        assert [len(pack) for pack in packs] == [
            sum(len(tree.prompt) + tree.unique_tokens() for tree in graded)
        ]


@PACKERS
def test_padding_trains_nothing_and_sees_only_itself(packer: Packer) -> None:
    trees, advantages = next(batches())
    for short in chain(*packer(trees, advantages, longest(trees), 2)):
        long = padded(short, len(short) + 5)
        assert len(long) == len(short) + 5
        np.testing.assert_array_equal(long.token[: len(short)], short.token)
        padding = slice(len(short), None)
        np.testing.assert_array_equal(long.exit[padding], np.arange(len(short), len(long)) + 1)
        assert set(long.source[padding]) <= {-1}
        assert set(long.tree[padding]) <= {-1}
        assert not (long.count_pos + long.count_neg)[padding].any()
        assert (long.exit[: len(short)] <= len(short)).all()
        assert long.leaf_weight == short.leaf_weight


def routed_batches() -> Iterator[tuple[list[Tree], Advantages]]:
    """`batches` with random routes, in uint8 and in uint16."""
    rng = np.random.default_rng(3)
    for experts, (trees, _) in zip((8, 300, 8, 300), batches(), strict=True):

        def routes(_: int, tokens: int, experts: int = experts) -> np.ndarray:
            return random_routes(rng, tokens, 3, experts, 2, missing=0.1)

        routed = [with_given_routes(tree, routes) for tree in trees]
        yield routed, estimate(routed, config_of())


@PACKERS
def test_a_token_has_the_route_of_its_node_in_every_pack(packer: Packer) -> None:
    """Also where it is context, or occurs in several trajectories."""
    for trees, advantages in routed_batches():
        for budget in budgets(trees):
            for pack in chain.from_iterable(packer(trees, advantages, budget, 2)):
                assert pack.route is not None
                for route, number, segment, offset in zip(
                    pack.route, pack.tree, pack.segment, pack.offset, strict=True
                ):
                    tree = trees[number]
                    of_node = tree.prompt_routes if segment == PROMPT else tree.segments[segment].routes
                    assert of_node is not None
                    assert route.dtype == of_node.dtype
                    np.testing.assert_array_equal(route, of_node[offset])


def test_routes_change_nothing_else_of_a_pack() -> None:
    for (routed, advantages), (plain, _) in zip(routed_batches(), batches(), strict=True):
        for packer in (pack_trees, pack_flat):
            ours, others = (chain(*packer(batch, advantages, longest(plain), 2)) for batch in (routed, plain))
            for one, other in zip(ours, others, strict=True):
                assert one.columns().keys() - other.columns().keys() == {"route"}
                for name, column in other.columns().items():
                    np.testing.assert_array_equal(getattr(one, name), column)


def test_padding_has_no_route_and_a_head_has_those_of_its_tokens() -> None:
    for trees, advantages in routed_batches():
        for pack in chain.from_iterable(pack_trees(trees, advantages, longest(trees), 1)):
            long, part = padded(pack, len(pack) + 5), head(pack, 3)
            assert pack.route is not None
            assert long.route is not None
            assert long.route.dtype == pack.route.dtype
            assert (long.route[len(pack) :] == no_route(pack.route.dtype)).all()
            np.testing.assert_array_equal(long.route[: len(pack)], pack.route)
            np.testing.assert_array_equal(part.route, pack.route[: len(part)])


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (None, "no routes"),
        ((3, 2, np.uint16), "routes of 3 layers with 2 experts each (uint16)"),
        ((4, 2, np.uint8), "routes of 4 layers with 2 experts each (uint8)"),
        ((3, 1, np.uint8), "routes of 3 layers with 1 experts each (uint8)"),
    ],
)
def test_trees_have_routes_of_one_model_or_none_has(second: tuple | None, found: str) -> None:
    trees, advantages = next(batches())
    kinds = [(3, 2, np.uint8), second, (3, 2, np.uint8), (3, 2, np.uint8)]

    def routed(tree: Tree, kind: tuple | None) -> Tree:
        if kind is None:
            return tree
        return with_given_routes(tree, lambda _, tokens: np.zeros((tokens, *kind[:2]), kind[2]))

    routed_trees = [routed(tree, kind) for tree, kind in zip(trees, kinds, strict=True)]
    first = "routes of 3 layers with 2 experts each (uint8)"
    message = f"the tree of prompt p0 has {first}, but that of p1 has {found}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack_trees(routed_trees, advantages, 10_000, 1)


def packed_tokens(tree: Tree, budget: int) -> int:
    packs = pack_trees([tree], estimate([tree], config_of()), budget, 1)
    return sum(len(pack) for replica in packs for pack in replica)


def test_splits_repeat_the_least_context() -> None:
    """Against every way of splitting the depth-first order into stretches, on small trees."""
    checked = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        (tree,) = random_batch(rng, 1, max_depth=3, max_children=2)
        # Depth-first, children in order: the packs' own order.
        order = sorted(range(len(tree.segments)), key=tree.path)
        budget = longest([tree]) + int(rng.integers(0, 6))
        if len(order) > 11 or len(tree.prompt) + tree.unique_tokens() <= budget:
            continue
        above = {
            node: len(tree.prompt) + sum(len(tree.segments[up].tokens) for up in tree.path(node)[:-1])
            for node in order
        }

        def tokens(part: list[int], tree: Tree = tree, above: dict[int, int] = above) -> int:
            return above[part[0]] + sum(len(tree.segments[node].tokens) for node in part)

        best = min(
            sum(map(tokens, parts))
            for count in range(len(order))
            for edges in combinations(range(1, len(order)), count)
            if max(map(tokens, parts := [
                order[start:stop] for start, stop in zip((0, *edges), (*edges, len(order)), strict=True)
            ])) <= budget
        )  # fmt: skip
        assert packed_tokens(tree, budget) == best
        checked += 1
    assert checked >= 15


def test_nodes_without_a_graded_leaf_below_them_are_left_out() -> None:
    tree = tree_of([-1, 0, 0, -1, 3], [1.0, None, None])
    (replica,) = pack_trees([tree], estimate([tree], config_of()), 100, 1)
    (pack,) = replica
    assert sorted(set(pack.segment.tolist())) == [PROMPT, 0, 1]


@PACKERS
def test_nothing_to_train_gives_every_replica_one_blank_token(packer: Packer) -> None:
    tree = tree_of([-1, 0, 0], [None, None])
    packs = packer([tree], estimate([tree], config_of()), 100, 2)
    assert [[len(pack) for pack in replica] for replica in packs] == [[1], [1]]
    assert not any(pack.count_pos.any() or pack.count_neg.any() for replica in packs for pack in replica)


def test_the_order_of_segments_and_leaves_does_not_matter() -> None:
    rng = np.random.default_rng(9)
    trees = random_batch(rng, 3)
    changed = [relabelled(tree, rng)[0] for tree in trees]
    budget = longest(trees) * 2

    def content(batch: Sequence[Tree]) -> list[tuple[object, ...]]:
        packs = pack_trees(batch, estimate(batch, config_of()), budget, 1)
        return sorted(
            (
                int(pack.tree[i]),
                tuple(pack.token[path_of(pack, i)].tolist()),
                *(round(float(getattr(pack, name)[i]), 9) for name in SUMS),
            )
            for pack, i in tokens_of(packs)
            if pack.count_pos[i] + pack.count_neg[i]
        )

    assert content(trees) == content(changed)


@pytest.mark.parametrize(
    ("trees", "parts", "sizes"), [(8, 2, [4, 4]), (7, 3, [2, 3, 2]), (2, 4, [1, 1]), (0, 3, [])]
)
def test_mini_batches_are_whole_trees(trees: int, parts: int, sizes: list[int]) -> None:
    batch = random_batch(np.random.default_rng(0), trees)
    advantages = estimate(batch, config_of())
    split = split_mini_batches(batch, advantages, parts)
    assert [len(part) for part, _ in split] == sizes
    assert [tree for part, _ in split for tree in part] == batch
    values = [theirs.value_M for _, theirs in split]
    np.testing.assert_array_equal(np.concatenate([*values, np.zeros(0)]), advantages.value_M)
    for part, theirs in split:
        alone = Forest.of(part)
        for field in fields(Forest):
            np.testing.assert_array_equal(getattr(theirs.forest, field.name), getattr(alone, field.name))


@PACKERS
def test_a_trajectory_longer_than_a_pack_is_refused(packer: Packer) -> None:
    tree = tree_of([-1, 0], [1.0], lengths=[5, 6])
    with pytest.raises(ValueError, match="13 tokens with its prompt; a pack holds 12"):
        packer([tree], estimate([tree], config_of()), 12, 1)


def test_a_blank_pack_is_one_untrained_token() -> None:
    pack = blank_pack()
    assert (len(pack), pack.exit[0], pack.source[0], pack.count_pos[0], pack.count_neg[0]) == (1, 1, -1, 0, 0)


@PACKERS
def test_the_head_of_a_pack_is_a_pack_of_its_first_tokens(packer: Packer) -> None:
    for trees, advantages in batches():
        for pack in chain.from_iterable(packer(trees, advantages, longest(trees), 1)):
            trained = pack.count_pos + pack.count_neg > 0
            for number in {1, 2, int(trained.sum()), len(pack) + 1}:
                part = head(pack, number)
                assert int(trained[: len(part)].sum()) == min(number, int(trained.sum()))
                assert len(part) == len(pack) or trained[len(part) - 1]
                assert (part.exit <= len(part)).all()
                for index in range(len(part)):
                    assert path_of(part, index) == path_of(pack, index)
                    seen = np.flatnonzero(part.exit[: index + 1] > index)
                    assert seen.tolist() == np.flatnonzero(pack.exit[: index + 1] > index).tolist()
