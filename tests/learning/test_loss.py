"""The loss: packed equals trajectory by trajectory, whichever clip binds, over the whole mini-batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.loss_scene import Scene, relative_difference, tensors
from tests.support.small_trees import config_of
from treepo.learning.kl import KL_ESTIMATORS
from treepo.learning.loss import denominator, policy_loss, summarise
from treepo.learning.mismatch import LogProbMismatch
from treepo.learning.packing import Pack, blank_pack, pack_flat, pack_trees, split_mini_batches

OPTIONS = [
    {},
    {"estimator": "spo", "importance": {"mode": "none"}},
    {"estimator": "treepo_segment", "normalisation": "sequence_mean"},
    {"estimator": "dr_grpo", "normalisation": "constant", "normalisation_tokens": 33},
    {"leaf_weights": "inverse_branching", "normalisation": "sequence_mean", "importance": {"high": 1.1}},
    {"leaf_weights": "inverse_branching", "normalisation": "constant", "normalisation_tokens": 9},
    *({"kl_coefficient": 0.3, "kl_estimator": name} for name in KL_ESTIMATORS),
    {"entropy_coefficient": 0.2, "importance": {"mode": "mask"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_packed_loss_and_gradient_equal_the_leaves_one_by_one(options: dict[str, object]) -> None:
    scene = Scene(0, options)
    expected = scene.naive_loss()
    expected_gradient = scene.policy.gradient(expected)
    everything = sum(len(tree.prompt) + tree.unique_tokens() for tree in scene.trees)
    least = max(len(tree.prompt) + len(tree.response(leaf)) for tree in scene.trees for leaf in tree.leaves)
    for packer, budget, replicas in [
        (pack_trees, everything, 1),
        (pack_trees, least, 3),  # every tree is split, some tokens are context in several packs
        (pack_flat, 2 * least, 2),
    ]:
        loss, metrics = scene.loss(scene.packs(packer, budget, replicas))
        # Float64: ten digits are left after sums over thousands of products in another order.
        assert relative_difference(loss, expected) < 1e-10
        assert relative_difference(scene.policy.gradient(loss), expected_gradient) < 1e-10
        assert min(metrics[name] for name in ("clip_high", "clip_low", "dual_clip")) > 0.01
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-10)


def test_the_net_advantage_alone_would_be_wrong() -> None:
    """Why a token carries two sums: with one, the gradient is wrong as soon as a clip binds."""
    scene = Scene(1, {})
    packs = scene.packs(pack_trees, 1000, 1)

    def netted(pack: Pack) -> Pack:
        net = pack.advantage_pos + pack.advantage_neg
        return replace(pack, advantage_pos=np.maximum(net, 0), advantage_neg=np.minimum(net, 0))

    expected = scene.policy.gradient(scene.naive_loss())
    wrong = scene.policy.gradient(scene.loss([[netted(pack) for pack in r] for r in packs])[0])
    assert relative_difference(wrong, expected) > 0.01


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_metrics_do_not_depend_on_the_packing(options: dict[str, object]) -> None:
    scene = Scene(2, options)
    packed, flat = (scene.loss(scene.packs(packer, 60, 2))[1] for packer in (pack_trees, pack_flat))
    assert packed.pop("unique_tokens") < flat.pop("unique_tokens")
    assert packed == pytest.approx(flat, rel=1e-10)


def loss_of_tokens(
    advantage: Sequence[float], log_ratio: Sequence[float], count: Sequence[float], **options: object
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of tokens that have log-prob -1 under the old policy and the engine."""
    value, weight = torch.tensor(advantage, dtype=torch.float64), torch.tensor(count, dtype=torch.float64)
    old = torch.full_like(value, -1.0)
    pack = {
        "advantage_pos": value.clamp(min=0) * weight,
        "advantage_neg": value.clamp(max=0) * weight,
        "count_pos": weight * (value >= 0),
        "count_neg": weight * (value < 0),
        "old_log_prob": old,
        "rollout_log_prob": old,
    }
    log_prob = old + torch.tensor(log_ratio, dtype=torch.float64)
    loss, metrics = policy_loss(log_prob, pack, config_of(**options), float(weight.sum()))
    return loss, summarise({key: float(metric) for key, metric in metrics.items()})


def test_metrics_by_hand() -> None:
    # Ratios 2, 1, 0.5, 20 and, not trained, 7; seen by 1, 2, 3, 4 and 0 leaves.
    loss, metrics = loss_of_tokens(
        [1.0, 0.0, -1.0, -0.5, 0.0],
        [math.log(2), 0.0, math.log(0.5), math.log(20), math.log(7)],
        [1, 2, 3, 4, 0],
    )
    assert loss.item() == pytest.approx((-1.28 + 3 * 0.8 + 4 * 0.5 * 10) / 10)
    assert metrics["clip_high"] == pytest.approx(0.1)
    assert metrics["clip_low"] == pytest.approx(0.3)
    assert metrics["dual_clip"] == pytest.approx(0.4)
    assert metrics["unique_tokens"] == 4
    assert metrics["ratio_max"] == pytest.approx(20)
    assert metrics["ratio_min"] == pytest.approx(0.5)
    kl = [ratio - 1 - math.log(ratio) for ratio in (2, 1, 0.5, 20)]
    assert metrics["old_kl"] == pytest.approx(np.average(kl, weights=[1, 2, 3, 4]))
    assert metrics["importance"] == pytest.approx(1)


def test_kl_and_entropy_by_hand() -> None:
    """Two tokens, seen by one leaf and by three; the reference gives them half and three times as much."""
    one = torch.ones(2, dtype=torch.float64)
    pack = {
        "advantage_pos": 0 * one,
        "advantage_neg": 0 * one,
        "count_pos": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "count_neg": torch.tensor([0.0, 1.0], dtype=torch.float64),
        "old_log_prob": -one,
        "rollout_log_prob": -one,
        "reference_log_prob": -one + torch.tensor([0.5, 3.0], dtype=torch.float64).log(),
    }
    entropy = torch.tensor([2.0, 0.4], dtype=torch.float64)
    kl = {
        "k1": (math.log(2) - 3 * math.log(3)) / 4,
        "k2": (math.log(2) ** 2 + 3 * math.log(3) ** 2) / 8,
        "k3": (0.5 - 1 + math.log(2) + 3 * (3 - 1 - math.log(3))) / 4,
    }
    for name, expected in kl.items():
        config = config_of(kl_coefficient=0.1, kl_estimator=name, entropy_coefficient=0.2)
        loss, metrics = policy_loss(-one, pack, config, 4.0, entropy)
        summary = summarise({key: float(metric) for key, metric in metrics.items()})
        assert summary["reference_kl"] == pytest.approx(expected)
        assert summary["entropy"] == pytest.approx((2 + 3 * 0.4) / 4)
        assert loss.item() == pytest.approx(0.1 * expected - 0.2 * (2 + 3 * 0.4) / 4)


def test_a_divergence_in_the_rewards_is_no_term_of_the_loss() -> None:
    plain, penalised = (Scene(8, options) for options in ({}, {"kl_coefficient": 0.3, "kl_in": "reward"}))
    losses = [scene.loss(scene.packs(pack_trees, 1000, 1)) for scene in (plain, penalised)]
    assert losses[0][0].item() == losses[1][0].item()
    assert "reference_kl" not in losses[1][1]


def test_the_entropy_bonus_decays_with_the_optimizer_steps() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    pack = {"advantage_pos": zero, "advantage_neg": zero, "count_pos": one, "count_neg": zero,
            "old_log_prob": -one, "rollout_log_prob": -one}  # fmt: skip
    config = config_of(entropy_coefficient=0.2, entropy_decay_steps=4)
    losses = [policy_loss(-one, pack, config, 1.0, 3 * one, step)[0].item() for step in (0, 1, 4, 5)]
    assert losses == pytest.approx([-0.6, -0.45, 0, 0])


def test_no_ratio_overflows() -> None:
    # float64 overflows at exp(710); k3 of the old policy is allowed to.
    for advantage in (1.0, -1.0):
        for log_ratio in (-800.0, 800.0):
            log_prob = torch.tensor([log_ratio - 900.0], dtype=torch.float64, requires_grad=True)
            one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
            pack = {
                "advantage_pos": one * max(advantage, 0),
                "advantage_neg": one * min(advantage, 0),
                "count_pos": one,
                "count_neg": zero,
                "old_log_prob": one * -900,
                "rollout_log_prob": one * -900,
            }
            loss, _ = policy_loss(log_prob, pack, config_of(), 1.0)
            (gradient,) = torch.autograd.grad(loss, log_prob)
            assert loss.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"normalisation": "sequence_mean"}])
def test_mini_batches_have_denominators_of_their_own(options: dict[str, object]) -> None:
    scene = Scene(3, options, trees=4)
    parts = split_mini_batches(scene.trees, scene.advantages, 2)
    divisors = [denominator(pack_trees(trees, part, 1000, 2), scene.config) for trees, part in parts]
    assert sum(divisors) == pytest.approx(denominator(scene.packs(pack_flat, 1000, 1), scene.config))
    leaves = [
        [leaf for tree in trees for leaf in tree.leaves if leaf.reward is not None] for trees, _ in parts
    ]
    if options:
        assert divisors == pytest.approx([len(part) for part in leaves])


def test_without_old_log_probs_the_policy_is_its_own_old_one() -> None:
    scene = Scene(4, {"importance": {"mode": "none"}})
    bare = pack_trees(scene.trees, scene.advantages, 1000, 1)
    loss, metrics = scene.loss(bare)
    # At ratio 1 the loss is minus the mean advantage, and the gradient is the policy gradient.
    sums = [float((pack.advantage_pos + pack.advantage_neg).sum()) for pack in bare[0]]
    assert loss.item() == pytest.approx(-sum(sums) / denominator(bare, scene.config), abs=1e-12)
    assert metrics["ratio_max"] == metrics["ratio_min"] == 1
    assert float(scene.policy.gradient(loss).norm()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batches": 2}, "mini_batches = 2 needs old_log_prob"),
        ({"kl_coefficient": 0.1}, "kl_coefficient = 0.1 needs reference_log_prob"),
        ({"entropy_coefficient": 0.1}, "entropy_coefficient = 0.1 needs the tokens' entropy"),
    ],
)
def test_what_the_loss_lacks_is_named(options: dict[str, object], message: str) -> None:
    pack = replace(blank_pack(), old_log_prob=None, reference_log_prob=None)
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(1), tensors(pack), config_of(**options), 1.0)


def test_a_blank_pack_adds_nothing() -> None:
    scene = Scene(5, {})
    packs = scene.packs(pack_trees, 1000, 1)
    with_blank = [packs[0], [blank_pack()]]
    alone, together = scene.loss(packs), scene.loss(with_blank)
    assert alone[0].item() == together[0].item()
    assert alone[1] == together[1]


@pytest.mark.parametrize("packer", [pack_trees, pack_flat])
def test_mismatch_counts_a_token_for_every_leaf(packer: Callable[..., list[list[Pack]]]) -> None:
    scene = Scene(6, {})
    differences = [
        abs(float(old) - float(rollout))
        for number, tree in enumerate(scene.trees)
        for leaf in tree.leaves
        if leaf.reward is not None
        for node in tree.path(leaf.segment)
        for old, rollout in zip(scene.old[number][node], tree.segments[node].log_probs, strict=True)
    ]
    first, second = map(LogProbMismatch.of, scene.packs(packer, 60, 2))
    assert (first + second).mean == pytest.approx(np.mean(differences), rel=1e-6)
    assert (first + second).largest == pytest.approx(max(differences), rel=1e-6)


def test_a_log_prob_that_is_no_number_is_not_hidden() -> None:
    scene = Scene(7, {})
    (packs,) = scene.packs(pack_trees, 1000, 1)
    old = np.where(packs[0].count_pos + packs[0].count_neg > 0, np.nan, 0).astype(np.float32)
    measured = LogProbMismatch.of([replace(packs[0], old_log_prob=old), *packs]) + LogProbMismatch.of(packs)
    assert math.isnan(measured.mean)
    assert math.isnan(measured.largest)
