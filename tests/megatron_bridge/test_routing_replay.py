"""Routing replay at real Megatron-Core ranks, against transformers with forced experts and one rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import megatron_ranks
from tests.support.forced_experts import ForcedExperts
from tests.support.megatron_ranks import BatchCase, Case, Result
from tests.support.random_trees import random_tree
from tests.support.routed_trees import random_routes, with_given_routes
from tests.support.trainer_checks import (
    CLOSE,
    TEMPERATURE,
    assert_same_step,
    assert_step_of,
    assert_the_same_bits,
    saved_gradients,
    trajectory_loss,
    with_old_log_prob,
    write_model,
)
from tests.support.trainer_layouts import CONFIGS, LAYOUTS, VOCABULARY
from treepo.config.learning import LearningConfig
from treepo.config.trainer import ParallelConfig
from treepo.learning import advantage, loss
from treepo.learning.packing import Pack, pack_flat, pack_trees
from treepo.protocols import BatchResult
from treepo.tree import Tree

pytestmark = pytest.mark.slow

MODELS = ["qwen3_moe", "qwen2_moe"]  # with a layer without experts; scaled scores, and a shared expert
LAYERS, EXPERTS, PER_TOKEN = 4, 4, 2
PERTURBED_LAYER, PERTURBED_EXPERT = 2, 3
Learned = tuple[BatchResult, dict[str, torch.Tensor]]
KL = LearningConfig(kl_coefficient=0.1)
REPLAYED = {
    "tensor 2": ("qwen2_moe", "none"),
    "tensor 2, expert 2": ("qwen3_moe", "selective"),
    "pipeline 2, interleaved": ("qwen2_moe", "full"),
    "data 2, expert 2": ("qwen3_moe", "none"),
    "tensor 2, pipeline 2, interleaved": ("qwen3_moe", "none"),
    "pipeline 2, data 2, expert 2": ("qwen2_moe", "full"),
    "context 2, expert 2": ("qwen3_moe", "selective"),
    "context 2, tensor 2, expert 4": ("qwen3_moe", "none"),
    "context 2, pipeline 2, interleaved": ("qwen2_moe", "full"),
}
"""Layouts, each with its model and what is recomputed."""


@dataclass(frozen=True)
class Batch:
    trees: list[Tree]
    packed: list[Pack]
    flat: list[Pack]
    denominator: float


def batch_of(trees: list[Tree]) -> Batch:
    """The trees in packs of which some hold a part of a tree."""
    advantages = advantage.estimate(trees, LearningConfig())
    longest = max(len(tree.prompt) + len(tree.response(leaf)) for tree in trees for leaf in tree.leaves)
    packed, flat = (
        [with_old_log_prob(pack) for pack in pack(trees, advantages, longest + 10, 1)[0]]
        for pack in (pack_trees, pack_flat)
    )
    return Batch(trees, packed, flat, loss.denominator([packed], LearningConfig()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The mixtures, and the first one with another row of a router."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: write_model(name, root / name) for name in MODELS}
    folders["perturbed"] = write_model(MODELS[0], root / "perturbed")
    file = folders["perturbed"] / "model.safetensors"
    weights = load_file(file)
    weights[f"model.layers.{PERTURBED_LAYER}.mlp.gate.weight"][PERTURBED_EXPERT] *= -3.0
    save_file(weights, file, metadata={"format": "pt"})
    return folders


@pytest.fixture(scope="module")
def batches(models: dict[str, Path]) -> dict[str, Batch]:
    """The same trees with random routes, some of which are missing; with routes that leave one expert out;
    and with the choice of each model.
    """
    rng = np.random.default_rng(11)
    trees = [random_tree(rng, f"p{index}", vocabulary=VOCABULARY, max_depth=4) for index in range(4)]

    def drawn(experts: int, missing: float) -> Batch:
        return batch_of([
            with_given_routes(
                tree, lambda _, tokens: random_routes(rng, tokens, LAYERS, experts, PER_TOKEN, missing)
            )
            for tree in trees
        ])  # fmt: skip

    result = {"random": drawn(EXPERTS, 0.2), "without one": drawn(PERTURBED_EXPERT, 0.0)}
    for name in MODELS:
        result[name] = batch_of([ForcedExperts(models[name]).with_own_choice(tree) for tree in trees])
    assert len(result["random"].packed) > 3
    return result


def case(name: str, model: Path, packs: Sequence[Pack], batch: Batch, mode: str = "rollout") -> Case:
    return Case(
        name, model, [[packs]], batch.denominator, temperature=TEMPERATURE, routing_replay=mode
    )  # fmt: skip


def whole(name: str, model: Path, batch: Batch, mode: str, layout: str | None = None) -> BatchCase:
    """The batch in two mini-batches. The second one's steps see what the first has changed."""
    parallel = ParallelConfig() if layout is None else LAYOUTS[layout]
    plain = [replace(pack, old_log_prob=None) for pack in batch.packed]
    parts: list[list[list[Pack]]] = [[plain[:2]], [plain[2:]]]
    if parallel.data == 2:  # one replica has nothing in the second mini-batch
        parts = [[plain[:1], plain[1:2]], [plain[2:], []]]
    shares = [(packs, loss.denominator(packs, KL)) for packs in parts]
    recompute = "none" if layout is None else REPLAYED[layout][1]
    return BatchCase(
        name, model, shares, parallel, KL, by_hand=False, recompute=recompute, routing_replay=mode
    )


@pytest.fixture(scope="module")
def one_rank(models, batches, tmp_path_factory) -> dict[str, Any]:
    random, spared = batches["random"], batches["without one"]
    cases: list[Case | BatchCase] = []
    for name in MODELS:
        folder, own = models[name], batches[name]
        cases += [
            case(f"{name}: random", folder, random.packed, random),
            case(f"{name}: own", folder, own.packed, own),
            case(f"{name}: none", folder, own.packed, own, "none"),
            whole(f"{name}: random batch", folder, random, "rollout"),
            whole(f"{name}: own batch", folder, own, "rollout"),
            whole(f"{name}: trainer batch", folder, own, "trainer"),
        ]
    first, own, perturbed = models[MODELS[0]], batches[MODELS[0]], models["perturbed"]
    cases += [
        case("flat", first, random.flat, random),
        replace(case("full", first, random.packed, random), recompute="full"),
        case("trainer", first, own.packed, own, "trainer"),
        replace(whole("by hand", first, random, "rollout"), by_hand=True),
        whole("batch without replay", first, own, "none"),
        case("spared", first, spared.packed, spared),
        case("spared, perturbed", perturbed, spared.packed, spared),
        case("own of the first, perturbed", perturbed, own.packed, own),
        case("none, perturbed", perturbed, own.packed, own, "none"),
    ]
    return megatron_ranks.run(cases, tmp_path_factory.mktemp("ranks") / "one")


@pytest.fixture(scope="module")
def parallel(models, batches, tmp_path_factory) -> dict[str, Any]:
    """Results by "layout: random batch" and "layout: trainer batch"."""
    cases = [
        whole(f"{layout}: {kind} batch", models[model], batches[routes], mode, layout)
        for layout, (model, _) in REPLAYED.items()
        for kind, routes, mode in (("random", "random", "rollout"), ("trainer", model, "trainer"))
    ]
    root, results = tmp_path_factory.mktemp("ranks"), {}
    for ranks in (2, 4):
        group = [each for each in cases if each.layout.ranks == ranks]
        results |= megatron_ranks.run(group, root / str(ranks))
    return results


def assert_log_probs(result: Result, batch: Batch, network: ForcedExperts) -> None:
    expected = [network.log_probs(tree, TEMPERATURE) for tree in batch.trees]
    for pack, values in zip(batch.packed, result.before[0], strict=True):
        places = zip(pack.tree, pack.segment, pack.offset, pack.source, strict=True)
        of_pack = [
            expected[tree][node, offset] if source >= 0 else 0.0 for tree, node, offset, source in places
        ]
        np.testing.assert_allclose(values, of_pack, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_forced_experts(name: str, one_rank, models, batches) -> None:
    """A packed tree's, against each trajectory by itself."""
    assert_log_probs(one_rank[f"{name}: random"], batches["random"], ForcedExperts(models[name]))
    without = one_rank[f"{name}: none"].before[0]
    differences = [
        np.abs(ours - other)
        for ours, other in zip(one_rank[f"{name}: random"].before[0], without, strict=True)
    ]
    assert np.concatenate(differences).mean() > 0.1  # else the routes would not matter


@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_that_of_forced_experts(name: str, one_rank, models, batches) -> None:
    batch, forced = batches["random"], ForcedExperts(models[name])
    for pack in batch.flat:
        assert pack.route is not None
        total = torch.zeros(())
        for start in np.flatnonzero(pack.source < 0):
            tokens = slice(start, pack.exit[start])
            forced.given = pack.route[tokens]
            total = total + trajectory_loss(forced.network, pack, tokens, batch.denominator)
        total.backward()
    assert_step_of(dict(saved_gradients(forced.network)), one_rank[f"{name}: random"])


def test_packed_and_flat_are_the_same_step(one_rank) -> None:
    assert_same_step(one_rank["flat"], one_rank[f"{MODELS[0]}: random"])


def test_recomputation_replays_the_same_experts(one_rank) -> None:
    assert_same_step(one_rank["full"], one_rank[f"{MODELS[0]}: random"])


@pytest.mark.parametrize(
    ("replaying", "name"), [*((f"{name}: own", name) for name in MODELS), ("trainer", MODELS[0])]
)
def test_replaying_the_own_choice_changes_no_bit(replaying: str, name: str, one_rank) -> None:
    """Neither do routes in the packs of a run that does not replay them."""
    result, none = one_rank[replaying], one_rank[f"{name}: none"]
    assert_the_same_bits(result, none)
    for ours, expected in zip(result.before[0], none.before[0], strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_own_choice_does_not_differ(one_rank) -> None:
    for name in MODELS:
        assert one_rank[f"{name}: own batch"][0].own_choice_differs == 0
    assert one_rank["batch without replay"][0].own_choice_differs is None


@pytest.mark.parametrize("name", MODELS)
def test_own_choice_differs_is_the_share_of_routed_pairs(name: str, one_rank, models, batches) -> None:
    """Counted by transformers, whose forced pass chooses the same experts."""
    forced = ForcedExperts(models[name])
    differing = routed = 0
    for pack in batches["random"].packed:
        assert pack.route is not None
        for index in range(len(pack)):
            path = [index]
            while pack.source[path[0]] >= 0:
                path.insert(0, int(pack.source[path[0]]))
            forced.given = pack.route[path]
            with torch.no_grad():
                forced.network(torch.from_numpy(pack.token[path]).long()[None])
            for layer, chosen in forced.chosen.items():
                route = pack.route[index, layer]
                if route.max() < EXPERTS:
                    routed += 1
                    differing += set(route.tolist()) != set(chosen[-1].tolist())
    result, _ = one_rank[f"{name}: random batch"]
    assert 0.5 < differing / routed < 1
    assert result.own_choice_differs == differing / routed


def test_a_batch_is_its_log_probs_and_its_steps(one_rank) -> None:
    """The reference's log-probs too, whose routers choose."""
    assert_same_batch(one_rank[f"{MODELS[0]}: random batch"], one_rank["by hand"])


@pytest.mark.parametrize("name", MODELS)
def test_trainer_replays_the_choice_before_the_first_step(name: str, one_rank) -> None:
    """The second mini-batch is trained with the experts that the initial weights choose, which transformers
    has computed, though the weights have moved so far that the routers would choose others.
    """
    result, final = one_rank[f"{name}: trainer batch"]
    expected, given = one_rank[f"{name}: own batch"]
    assert result.own_choice_differs > 0
    assert result.updates == expected.updates
    assert all(torch.equal(final[tensor], weight) for tensor, weight in given.items())


def test_training_without_replay_takes_another_course(one_rank) -> None:
    _, replayed = one_rank[f"{MODELS[0]}: trainer batch"]
    _, free = one_rank["batch without replay"]
    assert not all(torch.equal(replayed[tensor], weight) for tensor, weight in free.items())


def test_a_router_that_would_choose_otherwise_changes_no_bit_of_the_log_probs(one_rank) -> None:
    """Scores are scaled over the experts that are taken, and no route has the one whose row is perturbed."""
    pairs = zip(one_rank["spared"].before[0], one_rank["spared, perturbed"].before[0], strict=True)
    assert all(np.array_equal(ours, other) for ours, other in pairs)
    weight = f"model.layers.{PERTURBED_LAYER}.mlp.gate.weight"
    for name in ("spared", "spared, perturbed"):
        moved = (one_rank[name].final[weight] - one_rank[name].initial[weight]).abs().amax(1)
        assert moved[PERTURBED_EXPERT] == 0
        assert moved[:PERTURBED_EXPERT].min() > 0


def test_replay_removes_the_difference_that_flipped_routes_make(one_rank, models, batches) -> None:
    """An engine with the first model's weights, a trainer with a perturbed router: with replay its log-probs
    are those of its own scores for the engine's experts, and far closer to the engine's.
    """
    own = batches[MODELS[0]]
    replayed = one_rank["own of the first, perturbed"]
    assert_log_probs(replayed, own, ForcedExperts(models["perturbed"]))
    engine, free = one_rank[f"{MODELS[0]}: none"].before[0], one_rank["none, perturbed"].before[0]

    def distance(values: Sequence[np.ndarray]) -> float:
        pairs = zip(values, engine, strict=True)
        return float(np.concatenate([np.abs(ours - other) for ours, other in pairs]).mean())

    assert distance(free) > 0.1
    assert distance(replayed.before[0]) < distance(free)


@pytest.mark.parametrize("kind", ["random", "trainer"])
@pytest.mark.parametrize("layout", REPLAYED)
def test_every_layout_is_one_rank(layout: str, kind: str, parallel, one_rank) -> None:
    ours = parallel[f"{layout}: {kind} batch"]
    expected = one_rank[f"{REPLAYED[layout][0]}: {kind} batch"]
    assert_same_batch(ours, expected)
    assert ours[0].own_choice_differs == expected[0].own_choice_differs > 0


def assert_same_batch(ours: Learned, expected: Learned) -> None:
    """The log-probs are seen in their distance from those of the engine, and the gradients in the weights."""
    (result, final), (other, weights) = ours, expected
    assert result.mismatch.mean == pytest.approx(other.mismatch.mean, rel=1e-6)
    assert result.mismatch.largest == pytest.approx(other.mismatch.largest, rel=1e-5)
    for update, by_other in zip(result.updates, other.updates, strict=True):
        for key, value in by_other.items():
            assert update[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for tensor, weight in weights.items():
        torch.testing.assert_close(final[tensor], weight, **CLOSE, msg=tensor)


def test_the_layouts_are_of_mixtures() -> None:
    for name in MODELS:
        config = CONFIGS[name]
        found = (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok)
        assert found == (LAYERS, EXPERTS, PER_TOKEN)
