"""Policy losses: packed equals trajectory by trajectory, and each is what its paper prints."""

import math
import re
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.support.loss_scene import Scene, relative_difference
from tests.support.small_trees import config_of, tree_of
from treepo.learning import policy_losses
from treepo.learning.advantage import estimate
from treepo.learning.loss import policy_loss
from treepo.learning.packing import Pack, pack_flat, pack_trees
from treepo.learning.policy_losses import POLICY_LOSSES, Tokens
from treepo.tree import Tree

ALGORITHM = Path(__file__).parents[2] / "docs" / "algorithm.md"

# Tight bounds, so that the tests take every branch of a loss.
BOUNDS = {
    "ppo": {},
    "gspo": {"dual_clip": 1.5, "packing": "flat"},
    "segment_po": {"dual_clip": 1.5},
    "cispo": {"clip_low": 0.6, "clip_high": 0.5},
    "sapo": {"gate_pos": 1.7, "gate_neg": 0.6},
}
RULES = [
    {"loss": name, **BOUNDS[name], **rule}
    for name, rule in product(
        BOUNDS,
        [
            {"normalisation": "sequence_mean", "leaf_weights": "inverse_branching"},
            {"estimator": "treepo_segment", "kl_coefficient": 0.2, "importance": {"mode": "mask"}},
        ],
    )
]
RULE = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))


def packings(scene: Scene) -> list[tuple[Callable[..., list[list[Pack]]], int, int]]:
    """Packer, budget and replicas."""
    least = max(len(tree.prompt) + len(tree.response(leaf)) for tree in scene.trees for leaf in tree.leaves)
    flat = [(pack_flat, 2 * least, 2), (pack_flat, least, 1)]
    return flat if scene.config.packing == "flat" else [(pack_trees, 1000, 1), (pack_trees, least, 3), *flat]


def test_every_loss_is_tested() -> None:
    assert set(BOUNDS) == set(POLICY_LOSSES)


@RULE
def test_packed_loss_and_gradient_equal_the_leaves_one_by_one(rule: dict[str, object]) -> None:
    scene = Scene(0, rule)
    expected = scene.naive_loss()
    gradient = scene.policy.gradient(expected)
    for packer, budget, replicas in packings(scene):
        loss, metrics = scene.loss(scene.packs(packer, budget, replicas))
        # Float64: ten digits are left after sums over thousands of products in another order.
        assert relative_difference(loss, expected) < 1e-10
        assert relative_difference(scene.policy.gradient(loss), gradient) < 1e-10
        branches = {"clip_high", "clip_low", "dual_clip"} & set(metrics)
        assert all(metrics[name] > 0.01 for name in branches), "a branch of the loss was not taken"


@RULE
def test_metrics_do_not_depend_on_the_packing(rule: dict[str, object]) -> None:
    scene = Scene(1, rule)
    first, *others = (scene.loss(scene.packs(*packing))[1] for packing in packings(scene))
    for metrics in others:
        metrics["unique_tokens"] = first["unique_tokens"]
        assert metrics == pytest.approx(first, rel=1e-10)


def losses_of(name: str, log_ratio: Tensor, **columns: list[float]) -> Tensor:
    """The loss of each of some tokens by itself, of advantage 1 unless `columns` says otherwise."""
    one, zero = torch.ones_like(log_ratio), torch.zeros_like(log_ratio)
    given = {key: torch.tensor(value, dtype=log_ratio.dtype) for key, value in columns.items()}
    fields = {"advantage_pos": one, "advantage_neg": zero, "count_pos": one, "count_neg": zero} | given
    return POLICY_LOSSES[name].function(Tokens(log_ratio, **fields))[0]


def test_segment_po_is_gspo_on_trajectories_of_one_segment() -> None:
    """Trees whose leaves share nothing but the prompt."""
    trees = [tree_of([-1] * 4, [1.0, 0.0, 0.5, -1.0], lengths=[3, 5, 2, 4]) for _ in range(3)]
    assert_same(trees, "segment_po", "gspo", packing="flat")


def test_segment_po_is_ppo_if_every_segment_has_one_token() -> None:
    trees = [tree_of([-1, 0, 0, 1, 1, 2, 2], [1.0, 0.0, 0.5, -1.0]) for _ in range(3)]
    assert_same(trees, "segment_po", "ppo", packing="tree")


def assert_same(trees: list[Tree], first: str, second: str, packing: str) -> None:
    """Compare loss and gradient of two losses with the same bounds."""
    bounds = {"clip_low": 0.1, "clip_high": 0.2, "dual_clip": 1.5, "packing": packing}
    results = []
    for name in (first, second):
        config = config_of(loss=name, **bounds)
        packer = pack_trees if packing == "tree" else pack_flat
        (packs,) = packer(trees, estimate(trees, config), 1000, 1)
        (pack,) = packs
        columns = {key: torch.from_numpy(column) for key, column in pack.columns().items()}
        rng = np.random.default_rng(0)
        log_prob = torch.from_numpy(rng.normal(size=len(pack)) - 2).requires_grad_()
        columns["old_log_prob"] = torch.from_numpy(rng.normal(size=len(pack)) - 2)
        loss, metrics = policy_loss(log_prob, columns, config, 1.0)
        assert min(float(metrics[f"{name}_sum"]) for name in ("clip_high", "clip_low")) > 0
        (gradient,) = torch.autograd.grad(loss, log_prob)
        results.append((loss, gradient))
    # The same sums of the same numbers; a mean of one token is exact.
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_gspo_has_the_gradient_of_the_papers_objective() -> None:
    """With one advantage a response and `sequence_mean`: min(s A, clip(s) A), its true gradient, averaged."""
    scene = Scene(2, {"loss": "gspo", "packing": "flat", "normalisation": "sequence_mean",
                      "estimator": "grpo", "clip_low": 0.2, "clip_high": 0.2,
                      "importance": {"mode": "none"}})  # fmt: skip
    terms, weights = [], []
    for response in scene.responses():
        length, place = len(response.old), torch.arange(len(response.token))
        log_prob, _ = scene.policy.log_probs_and_entropy(
            response.token, place, torch.full_like(place, len(place)), place - 1
        )
        ratio = (log_prob[-length:] - response.old).mean().exp()
        advantage = response.advantage[0]
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        terms.append(torch.maximum(gain, 10 * advantage) if advantage < 0 else gain)
        weights.append(response.weight)
    expected = -torch.stack(terms) @ torch.tensor(weights, dtype=torch.float64) / sum(weights)
    loss, _ = scene.loss(scene.packs(pack_flat, 1000, 1))
    assert relative_difference(loss, expected) < 1e-10
    assert relative_difference(scene.policy.gradient(loss), scene.policy.gradient(expected)) < 1e-10


def test_cispo_clips_the_weight_and_keeps_the_gradient() -> None:
    log_ratio = torch.tensor([math.log(9), math.log(2), math.log(0.01)], dtype=torch.float64)
    log_ratio.requires_grad_()
    (gradient,) = torch.autograd.grad(losses_of("cispo", log_ratio).sum(), log_ratio)
    # The upper bound is 1 + 4; there is no lower one.
    torch.testing.assert_close(gradient, -torch.tensor([5, 2, 0.01], dtype=torch.float64))


@pytest.mark.parametrize(("side", "gate"), [("pos", 1.0), ("neg", 1.05)])
def test_sapo_has_the_papers_gate(side: str, gate: float) -> None:
    """The weight of r A is 4 p (1 - p) with p = sigmoid(gate (r - 1)), so 1 at r = 1."""
    log_ratio = torch.tensor([0.0, 0.5, -0.5, 2.0], dtype=torch.float64, requires_grad=True)
    sign = 1.0 if side == "pos" else -1.0
    columns = {"advantage_pos": [0.0] * 4, "advantage_neg": [0.0] * 4} | {f"advantage_{side}": [sign] * 4}
    (gradient,) = torch.autograd.grad(losses_of("sapo", log_ratio, **columns).sum(), log_ratio)
    ratio = log_ratio.detach().exp()
    p = 1 / (1 + (-gate * (ratio - 1)).exp())
    torch.testing.assert_close(gradient, -sign * 4 * p * (1 - p) * ratio)
    assert float(gradient[0]) == -sign


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_at_ratio_one_every_loss_has_the_policy_gradient(name: str) -> None:
    log_ratio = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    columns = {"advantage_pos": [2.0, 0.0], "advantage_neg": [0.0, -3.0]}
    (gradient,) = torch.autograd.grad(losses_of(name, log_ratio, **columns).sum(), log_ratio)
    assert gradient.tolist() == pytest.approx([-2.0, 3.0], rel=1e-14)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_ratio_overflows(name: str, dtype: torch.dtype) -> None:
    # float64 overflows at exp(710).
    log_ratio = torch.tensor([-800.0, 800.0, 30.0, 60.0] * 2, dtype=dtype, requires_grad=True)
    columns = {"advantage_pos": [1.0] * 4 + [0.0] * 4, "advantage_neg": [0.0] * 4 + [-1.0] * 4}
    losses = losses_of(name, log_ratio, **columns)
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratio)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def test_advantages_are_clipped_after_whitening() -> None:
    trees = [tree_of([-1, 0, 0, -1], [5.0, 0.0, -1.0]), tree_of([-1, -1], [1.0, 0.0])]
    free, clipped = (estimate(trees, config_of(advantage_clip=clip)).value_M for clip in (None, 0.7))
    assert abs(free).max() > 0.7
    np.testing.assert_array_equal(clipped, np.clip(free, -0.7, 0.7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "gspo"}, "loss = gspo with packing = tree: a shared token would need a ratio for each"),
        (
            {"loss": "sapo", "clip_low": 0.1},
            "clip_low = 0.1 with loss = sapo: only ppo, gspo, segment_po, ci",
        ),
        ({"gate_pos": 2.0}, "gate_pos = 2.0 with loss = ppo: only sapo reads it; leave it at null"),
        (
            {"loss": "cispo", "dual_clip": 3.0},
            "dual_clip = 3.0 with loss = cispo: only ppo, gspo, segment_po",
        ),
        ({"loss": "gpso"}, "found 'gpso'; did you mean 'gspo'"),
        ({"advantage_clip": 0.0}, "greater than 0"),
    ],
)
def test_options_that_cannot_hold_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("(", r"\(")):
        config_of(**options)


def test_a_loss_is_added_as_documented() -> None:
    section = ALGORITHM.read_text().partition("### Adding a loss\n")[2]
    example = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    before = set(POLICY_LOSSES)
    exec(example, vars(policy_losses) | {"Tensor": Tensor})
    (name,) = POLICY_LOSSES.keys() - before
    try:
        trees = [tree_of([-1, 0, 0], [1.0, 0.0], lengths=[2, 3, 1])]
        config = config_of(loss=name, importance={"mode": "none"})
        (packs,) = pack_trees(trees, estimate(trees, config), 100, 1)
        columns = {key: torch.from_numpy(column) for key, column in packs[0].columns().items()}
        log_prob = torch.full((len(packs[0]),), -1.0, dtype=torch.float64, requires_grad=True)
        loss, _ = policy_loss(log_prob, columns, config, 1.0)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        expected = -(packs[0].advantage_pos + packs[0].advantage_neg)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    finally:
        del POLICY_LOSSES[name]


def test_the_parity_tests_have_tokens_that_leaves_pull_both_ways() -> None:
    packs = chain.from_iterable(Scene(0, RULES[0]).packs(pack_trees, 1000, 1))
    assert any(((pack.advantage_pos > 0) & (pack.advantage_neg < 0)).any() for pack in packs)
