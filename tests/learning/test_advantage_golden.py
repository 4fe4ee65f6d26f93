"""The numbers of the official implementation, for those of its estimators that are correct."""

import json
from typing import Any

import numpy as np
import pytest

from tests.support.paths import SHARED
from tests.support.small_trees import config_of, tree_of
from treepo.config.learning import LearningConfig
from treepo.learning.advantage import estimate
from treepo.tree import Tree

GOLDEN = SHARED / "golden" / "advantages.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []
TOLERANCE = 1e-5  # the file has six decimals

pytestmark = pytest.mark.skipif(not CASES, reason=f"{GOLDEN} is not here")


def golden_trees(case: dict[str, Any]) -> tuple[list[Tree], list[tuple[int, int]]]:
    """The case's trees, and the (tree, leaf) of each of its paths."""
    prompts = list(dict.fromkeys(path[0] for path in case["paths"]))
    trees, places = [], {}
    for number, prompt in enumerate(prompts):
        members = [index for index, path in enumerate(case["paths"]) if path[0] == prompt]
        paths = [case["paths"][index] for index in members]
        nodes = sorted({tuple(path[: end + 1]) for path in paths for end in range(1, len(path))}, key=len)
        node_index = {(prompt,): -1} | {node: index for index, node in enumerate(nodes)}
        lengths = [case["segment_tokens"]] * len(nodes)
        for index, path in zip(members, paths, strict=True):
            lengths[node_index[tuple(path)]] = case["lengths"][index] - case["segment_tokens"] * (
                len(path) - 2
            )
        by_leaf = sorted(members, key=lambda index: node_index[tuple(case["paths"][index])])
        places |= {index: (number, leaf) for leaf, index in enumerate(by_leaf)}
        trees.append(
            tree_of(
                [node_index[node[:-1]] for node in nodes],
                [case["rewards"][index] for index in by_leaf],
                lengths,
            )
        )
    return trees, [places[index] for index in range(len(case["paths"]))]


def values_of_paths(case: dict[str, Any], config: LearningConfig) -> list[np.ndarray]:
    """For each path of the case one advantage a segment."""
    trees, places = golden_trees(case)
    advantages = estimate(trees, config)
    leaves = [advantages.forest.first_leaf_P[tree] + leaf for tree, leaf in places]
    return [advantages.value_M[slice(*advantages.forest.path_offset_L[leaf : leaf + 2])] for leaf in leaves]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(("weighting", "key"), [("mean", "average"), ("size", "group_size")])
def test_treepo_matches_the_official_subgroups(
    case: dict[str, Any], weighting: str, key: str, drop: bool
) -> None:
    config = config_of(weighting=weighting, drop_zero_std=drop)
    expected = case["expected"][f"subgroup_{key}{'_dropzero' if drop else ''}"]
    for values, value in zip(values_of_paths(case, config), expected, strict=True):
        np.testing.assert_allclose(values, value, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize(("eta", "key"), [(None, "-1.0"), (0.5, "0.5")])
def test_treepo_segment_matches_the_official_progress(
    case: dict[str, Any], eta: float | None, key: str
) -> None:
    config = config_of(estimator="treepo_segment", eta=eta)
    expected = case["expected"][f"segment_progress_eta{key}"]
    for values, tokens in zip(values_of_paths(case, config), expected, strict=True):
        per_token = np.repeat(values, case["segment_tokens"])[: len(tokens)]
        np.testing.assert_allclose(per_token, tokens, rtol=0, atol=TOLERANCE)
