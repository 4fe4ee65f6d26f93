"""Importance weights: packed equals response by response, at every level, and masked tokens teach nothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.support.loss_scene import Scene, naive_importance_metrics, relative_difference, tensors
from tests.support.small_trees import config_of
from treepo.config.learning import ImportanceConfig, LearningConfig
from treepo.learning.importance import importance_weights
from treepo.learning.loss import policy_loss, summarise
from treepo.learning.packing import Pack, blank_pack, pack_flat, pack_trees, padded
from treepo.tree import PROMPT

MODES = [
    {"mode": "truncate"},
    {"mode": "truncate", "low": 0.4, "high": 1.2},
    {"mode": "mask"},
    {"mode": "mask", "low": 0.4, "high": 1.2},
    {"mode": "none"},
]
RULES = [mode | {"level": level} for mode, level in product(MODES, ("token", "segment", "leaf"))]
RULE = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
Packer = Callable[..., list[list[Pack]]]


def scene_of(seed: int, rule: dict[str, object], **options: object) -> Scene:
    packing = "flat" if rule.get("level") == "leaf" else "tree"
    return Scene(seed, {"importance": rule, "packing": packing, **options})


def packings(scene: Scene) -> list[tuple[Packer, int, int]]:
    """Packer, budget and replicas: everything together, every tree split, trajectories."""
    everything = sum(len(tree.prompt) + tree.unique_tokens() for tree in scene.trees)
    least = max(len(tree.prompt) + len(tree.response(leaf)) for tree in scene.trees for leaf in tree.leaves)
    flat: list[tuple[Packer, int, int]] = [(pack_flat, least, 3), (pack_flat, 3 * least, 1)]
    if scene.config.packing == "flat":
        return flat
    return [(pack_trees, everything, 1), (pack_trees, least, 3), *flat]


def contexts(packs: Sequence[Sequence[Pack]]) -> int:
    """Count tokens of segments that are trained in another pack."""
    return sum(
        int(((pack.count_pos + pack.count_neg == 0) & (pack.segment != PROMPT)).sum())
        for pack in chain.from_iterable(packs)
    )


@RULE
@pytest.mark.parametrize("seed", range(2))
def test_every_packing_equals_the_responses_one_by_one(rule: dict[str, object], seed: int) -> None:
    scene = scene_of(seed, rule)
    expected = scene.naive_loss()
    expected_gradient = scene.policy.gradient(expected)
    for packer, budget, replicas in packings(scene):
        packs = scene.packs(packer, budget, replicas)
        assert (contexts(packs) > 0) == (packer is pack_trees and replicas > 1)
        loss, _ = scene.loss(packs)
        # Float64: ten digits are left after sums over thousands of products in another order.
        assert relative_difference(loss, expected) < 1e-10
        assert relative_difference(scene.policy.gradient(loss), expected_gradient) < 1e-10


@RULE
@pytest.mark.parametrize(
    "options",
    [{}, {"leaf_weights": "inverse_branching", "normalisation": "sequence_mean"}],
    ids=["", "weighted"],
)
def test_metrics_are_those_of_the_responses(rule: dict[str, object], options: dict[str, object]) -> None:
    scene = scene_of(5, rule, **options)
    expected = naive_importance_metrics(scene)
    if rule["mode"] != "none":
        assert min(expected["importance_above"], expected["effective_sample_share"]) > 0.01
        assert (expected["importance_below"] > 0.01) == (rule != {"mode": "truncate", "level": rule["level"]})
        assert expected["effective_sample_share"] < 0.99
    rng = np.random.default_rng(0)
    splits = [(packer, int(rng.integers(least, 3 * least)), int(rng.integers(1, 5)))
              for packer, least, _ in packings(scene) for _ in range(3)]  # fmt: skip
    for packer, budget, replicas in [*packings(scene), *splits]:
        with torch.no_grad():
            _, metrics = scene.loss(scene.packs(packer, budget, replicas))
        measured = {key: value for key, value in metrics.items() if key in MEASURED}
        assert measured == pytest.approx(expected, rel=1e-10)


MEASURED = {
    *("importance", "importance_min", "importance_max", "importance_weight"),
    *("importance_below", "importance_above", "effective_sample_share"),
}


@pytest.mark.parametrize("level", ["token", "segment", "leaf"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_padding_and_blank_packs_change_nothing(level: str, mode: str) -> None:
    scene = scene_of(4, {"mode": mode, "level": level})
    packer, budget, replicas = packings(scene)[-1]
    packs = scene.packs(packer, budget, replicas)
    longer = [*[[padded(pack, len(pack) + 7) for pack in replica] for replica in packs], [blank_pack()]]
    (loss, metrics), (other, others) = scene.loss(packs), scene.loss(longer)
    assert other.item() == pytest.approx(loss.item(), rel=1e-12)
    assert others == pytest.approx(metrics, rel=1e-12)
    gradients = (scene.policy.gradient(value) for value in (other, loss))
    assert relative_difference(*gradients) < 1e-10


@pytest.mark.parametrize("level", ["token", "segment", "leaf"])
def test_the_version_of_a_token_does_not_matter(level: str) -> None:
    """The engine's log-prob already belongs to the weights that sampled the token, token by token."""
    scene = scene_of(5, {"mode": "mask", "level": level})
    packer, budget, replicas = packings(scene)[-1]
    packs = scene.packs(packer, budget, replicas)
    rng = np.random.default_rng(0)
    mixed = [
        [replace(pack, version=rng.integers(0, 4, len(pack)).astype(np.int32)) for pack in replica]
        for replica in packs
    ]
    (loss, metrics), (other, others) = scene.loss(packs), scene.loss(mixed)
    assert (other.item(), others) == (loss.item(), metrics)


def pack_of(
    ratio: Sequence[float], *, offset: Sequence[int], source: Sequence[int], count: Sequence[float]
) -> dict[str, Tensor]:
    """The columns of a pack in which the trainer gives each token log-prob -1 before the first update."""
    old = torch.full((len(ratio),), -1.0, dtype=torch.float64)
    weight = torch.tensor(count, dtype=torch.float64)
    return {
        "advantage_pos": weight,
        "advantage_neg": torch.zeros_like(weight),
        "count_pos": weight,
        "count_neg": torch.zeros_like(weight),
        "old_log_prob": old,
        "rollout_log_prob": old - torch.tensor(ratio, dtype=torch.float64).log(),
        "offset": torch.tensor(offset, dtype=torch.int32),
        "source": torch.tensor(source, dtype=torch.int32),
    }


# Two trajectories of a prompt of one token: two segments below it, then one; the last token is padding.
BY_HAND = pack_of(
    [7, 8, 2, 2, 0.5, 9, 0.25, 0.25, 1],
    offset=[0, 0, 1, 0, 1, 0, 0, 1, 0],
    source=[-1, 0, 1, 2, 3, -1, 5, 6, -1],
    count=[0, 1, 1, 1, 1, 0, 3, 3, 0],
)


@pytest.mark.parametrize(
    ("level", "ratios"),
    [
        ("token", [1, 8, 2, 2, 0.5, 1, 0.25, 0.25, 1]),
        ("segment", [1, 4, 4, 1, 1, 1, 0.25, 0.25, 1]),
        ("leaf", [1, 2, 2, 2, 2, 1, 0.25, 0.25, 1]),
    ],
)
@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [("truncate", None, 3.0), ("truncate", 0.3, 3.0), ("mask", 0.3, 3.0), ("mask", None, 3.0)],
)
def test_weights_by_hand(level: str, ratios: list[float], mode: str, low: float | None, high: float) -> None:
    config = ImportanceConfig.model_validate({"mode": mode, "level": level, "low": low, "high": high})
    least = low if low is not None else (1 / high if mode == "mask" else 0)
    expected = np.clip(ratios, least, high)
    if mode == "mask":
        expected = np.where(expected == np.array(ratios), expected, 0)
    weight, metrics = importance_weights(BY_HAND["old_log_prob"], BY_HAND, config)
    np.testing.assert_allclose(weight, expected, rtol=1e-12)
    count = BY_HAND["count_pos"].numpy()
    assert float(metrics["importance_above_sum"]) == count @ (np.array(ratios) > high)
    assert float(metrics["importance_below_sum"]) == count @ (np.array(ratios) < least)
    assert float(metrics["importance_sum"]) == pytest.approx(count @ ratios)


def test_a_long_segment_does_not_explode() -> None:
    """Tokens that all differ by 1% have a ratio of 1.01, however many they are; their product is 21,000."""
    tokens = 1000
    pack = pack_of(
        [1.01] * tokens,
        offset=range(tokens),
        source=range(-1, tokens - 1),
        count=[0, *[1] * (tokens - 1)],
    )
    config = ImportanceConfig(level="segment", high=1.5)
    weight, _ = importance_weights(pack["old_log_prob"], pack, config)
    np.testing.assert_allclose(weight[1:], 1.01, rtol=1e-12)


@pytest.mark.parametrize("level", ["token", "segment", "leaf"])
def test_masked_tokens_have_no_gradient(level: str) -> None:
    """Exactly none, and the others have that of their ratio; the denominator counts the masked ones."""
    config = config_of(importance={"mode": "mask", "level": level, "high": 3.0}, packing="flat")
    log_prob = torch.full_like(BY_HAND["old_log_prob"], -1.0).requires_grad_()
    loss, metrics = policy_loss(log_prob, BY_HAND, config, 10.0)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    weight, _ = importance_weights(BY_HAND["old_log_prob"], BY_HAND, config.importance)
    masked = weight == 0
    assert 0 < masked.sum() < len(masked)
    assert (gradient[masked] == 0).all()
    np.testing.assert_allclose(gradient, -BY_HAND["advantage_pos"] * weight / 10, rtol=1e-12)
    assert metrics["weight_sum"] == 10


def test_if_all_tokens_are_masked_nothing_is_learned() -> None:
    pack = pack_of([1, 9, 9], offset=[0, 0, 1], source=[-1, 0, 1], count=[0, 1, 2])
    log_prob = pack["old_log_prob"].clone().requires_grad_()
    loss, metrics = policy_loss(log_prob, pack, config_of(importance={"mode": "mask"}), 3.0)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    summary = summarise({key: float(metric) for key, metric in metrics.items()})
    assert (loss.item(), gradient.abs().max()) == (0, 0)
    assert (summary["importance_above"], summary["effective_sample_share"]) == (1, 0)


@pytest.mark.parametrize("level", ["token", "segment", "leaf"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_weights_are_constants_of_the_batch(level: str, mode: str) -> None:
    """A later optimizer step has another policy, but the weights of the log-probs before the first."""
    importance = {"mode": mode, "level": level, "low": 0.3, "high": 3.0}
    config = config_of(importance=importance, packing="flat", mini_batches=2)
    weight, measured = importance_weights(BY_HAND["old_log_prob"], BY_HAND, config.importance)
    for step in (0.0, 0.05, -0.1):
        log_prob = (BY_HAND["old_log_prob"] + step).requires_grad_()
        loss, metrics = policy_loss(log_prob, BY_HAND, config, 1.0)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        np.testing.assert_allclose(gradient, -BY_HAND["advantage_pos"] * weight * math.exp(step), rtol=1e-12)
        assert {key: metrics[key] for key in measured} == measured
    old = BY_HAND["old_log_prob"].clone().requires_grad_()
    assert not importance_weights(old, BY_HAND, config.importance)[0].requires_grad


@pytest.mark.parametrize("level", ["token", "segment", "leaf"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_log_prob_that_is_no_number_is_not_masked(level: str, mode: str) -> None:
    old = BY_HAND["old_log_prob"].clone()
    old[3] = math.nan
    config = ImportanceConfig.model_validate({"mode": mode, "level": level})
    weight, metrics = importance_weights(old, BY_HAND, config)
    assert weight[3].isnan()
    assert metrics["importance_weight_sum"].isnan()
    assert weight[6:].isfinite().all()


def test_float32_segments_agree_in_every_packing() -> None:
    """As on a device: the ratio of a segment is the same number wherever the segment is in a pack."""
    scene = scene_of(6, {"mode": "mask", "level": "segment"})
    found: dict[tuple[int, int], set[float]] = {}
    for packer, budget, replicas in packings(scene):
        for pack in chain.from_iterable(scene.packs(packer, budget, replicas)):
            columns = tensors(pack)
            weight, _ = importance_weights(columns["old_log_prob"], columns, scene.config.importance)
            assert weight.dtype == torch.float32
            trained = pack.count_pos + pack.count_neg > 0
            for tree, segment, value in zip(
                pack.tree[trained], pack.segment[trained], weight.numpy()[trained], strict=True
            ):
                found.setdefault((int(tree), int(segment)), set()).add(float(value))
    assert all(len(values) == 1 for values in found.values())
    assert len({value for values in found.values() for value in values}) > 5


def test_the_defaults_are_truncation_of_tokens_at_2() -> None:
    assert LearningConfig().importance == ImportanceConfig(mode="truncate", level="token", low=None, high=2.0)
    assert ImportanceConfig().bounds == (0, 2)
    assert ImportanceConfig(mode="mask", high=4.0).bounds == (0.25, 4)
    assert ImportanceConfig(mode="mask", low=0.5, high=4.0).bounds == (0.5, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": {"mode": "none", "low": 0.5}}, "low = 0.5 with mode = none: only truncate and mask"),
        ({"importance": {"mode": "none", "high": 3.0}}, "high = 3.0 with mode = none: .* leave it at 2.0"),
        ({"importance": {"level": "leaf"}}, "importance.level = leaf with packing = tree: a shared token"),
        ({"importance": {"low": 1.0}}, "less than 1"),
        ({"importance": {"low": 0.0}}, "greater than 0"),
        ({"importance": {"high": 0.9}}, "greater than or equal to 1"),
    ],
)
def test_rules_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(**options)
