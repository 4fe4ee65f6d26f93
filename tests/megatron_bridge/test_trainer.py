"""Real Megatron-Core ranks: against transformers, packed against flat, every layout against one rank."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support import megatron_ranks
from tests.support.megatron_ranks import BatchCase, Case, Result
from tests.support.trainer_checks import (
    CLOSE,
    TEMPERATURE,
    Batch,
    assert_same_log_probs,
    assert_same_step,
    assert_step_of,
    assert_the_same_bits,
    random_batch,
    saved_gradients,
    trajectory_loss,
    write_model,
)
from tests.support.trainer_layouts import (
    BATCHES,
    CONFIGS,
    LAYOUTS,
    MODELS,
    PAIRS,
    RECOMPUTE,
    VARIANTS,
)
from treepo.config.learning import ImportanceConfig, LearningConfig
from treepo.config.trainer import OptimizerConfig
from treepo.learning import loss
from treepo.learning.packing import Pack, blank_pack, padded
from treepo.tree import PROMPT, Tree

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def batch() -> Batch:
    batch = random_batch(seed=5, number=6)
    assert len(batch.packed) > 3
    assert len({len(pack) for pack in batch.packed}) > 1
    assert batch.denominator == pytest.approx(loss.denominator([batch.flat], LearningConfig()))
    return batch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(name, root / name) for name in CONFIGS}


@pytest.fixture(scope="module")
def one_rank(models, batch, tmp_path_factory) -> dict[str, Result]:
    """Every model on one rank, and on the first one the variants that must make no difference."""
    cases = [standard(name, models[name], [batch.packed], batch.denominator) for name in CONFIGS]
    qwen2 = cases[0]
    cases += [replace(case, name=f"{case.name}, one step", steps=case.steps[:1]) for case in cases]
    cases += [
        replace(qwen2, name="flat", steps=[[batch.flat]] * 2),
        replace(qwen2, name="masked", learning=MASKED),
        replace(qwen2, name="masked, flat", learning=MASKED, steps=[[batch.flat]] * 2),
        replace(qwen2, name="masked, versions", learning=MASKED, steps=[[mixed_versions(batch.packed)]] * 2),
        replace(qwen2, name="padded", steps=[[[padded(pack, len(pack) + 70) for pack in batch.packed]]] * 2),
        replace(qwen2, name="full", recompute="full"),
        replace(qwen2, name="selective", recompute="selective"),
        replace(qwen2, name="spoilt", spoilt=[spoilt(batch.packed)]),
        replace(qwen2, name="entropy", learning=BONUS),
        *(replace(qwen2, name=f"offload {what}", offload=what) for what in OFFLOADS),
        replace(qwen2, name="offload all, bfloat16", offload="all", dtype="bfloat16"),
        replace(qwen2, name="not offloaded, bfloat16", dtype="bfloat16"),
        replace(qwen2, name="warm-up", steps=[[batch.packed]] * 5, optimizer=WARM_UP),
        replace(qwen2, name="cosine", steps=[[batch.packed]] * 5, optimizer=COSINE),
        replace(qwen2, name="linear", steps=[[batch.packed]] * 3, optimizer=LINEAR),
        replace(qwen2, name="bfloat16", dtype="bfloat16", steps=[[batch.packed]] * 12, optimizer=SMALL_STEPS),
    ]
    return megatron_ranks.run(cases, tmp_path_factory.mktemp("ranks") / "one")


OFFLOADS: list[Literal["none", "optimizer", "all"]] = ["none", "optimizer", "all"]
BONUS = LearningConfig(entropy_coefficient=0.1)
KL = LearningConfig(kl_coefficient=0.1)
# Engine and trainer differ by at most 10%, most segments by less than 3%.
MASKED = LearningConfig(importance=ImportanceConfig(mode="mask", level="segment", low=0.97, high=1.03))
# A random model's own log-probs are far below those that the packs give as the engine's.
MASKED_BATCH = LearningConfig(
    kl_coefficient=0.1, importance=ImportanceConfig(mode="mask", level="segment", low=0.1, high=2.0)
)
WARM_UP = OptimizerConfig(learning_rate=1e-3, warmup_steps=4)
LINEAR = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="linear", decay_steps=2)
COSINE = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=1, schedule="cosine", decay_steps=4, min_learning_rate=1e-4
)
# Steps of which one is too small to change a bfloat16 weight near 0.15 (spaced by 2^-10), but twelve are not.
SMALL_STEPS = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0)


def standard(name: str, model: Path, replicas: Sequence[Sequence[Pack]], denominator: float) -> Case:
    """Two steps on the same batch: the second sees the effect of the first."""
    return Case(name, model, [replicas] * 2, denominator, temperature=TEMPERATURE)


def spoilt(packs: Sequence[Pack]) -> list[Pack]:
    """The packs with a gradient that is no number."""
    first, *others = packs
    return [replace(first, advantage_pos=np.full(len(first), np.nan)), *others]


@pytest.fixture(scope="module")
def parallel(models, batch, tmp_path_factory) -> dict[str, Any]:
    """Results by "layout: model" and "layout: variant"; all layouts of a number of ranks share processes.

    Replicas get unequal numbers of packs, one even none in the second step.
    """
    cases = [case for layout in LAYOUTS for case in cases_at(layout, models, batch)]
    cases += [case for layout in BATCHES for case in batch_cases(layout, models, batch)]
    root = tmp_path_factory.mktemp("ranks")
    results: dict[str, Any] = {}
    for ranks in (2, 4):
        group = [case for case in cases if case.layout.ranks == ranks]
        results |= megatron_ranks.run(group, root / str(ranks))
    return results


def batch_cases(name: str, models: dict[str, Path], batch: Batch) -> list[BatchCase]:
    """The same batch in two mini-batches, as a whole and by hand; one replica has no pack in the second."""
    plain = [replace(pack, old_log_prob=None) for pack in batch.packed]
    steps = [[plain[:1], plain[2:]], [plain[1:2], []]]
    if LAYOUTS[name].data == 1:
        steps = [[plain[:3]], [plain[3:]]]
    whole = [(packs, loss.denominator(packs, MASKED_BATCH)) for packs in steps]
    # Blank packs are not given the log-probs that the loss needs, unless they are there from the beginning.
    by_hand = [(filled(packs), denominator) for packs, denominator in whole]
    model = models[MODELS[name][0]]
    return [
        BatchCase(f"{name}: batch", model, whole, LAYOUTS[name], MASKED_BATCH, by_hand=False),
        BatchCase(f"{name}: by hand", model, by_hand, LAYOUTS[name], MASKED_BATCH, by_hand=True),
    ]


def filled(replicas: Sequence[Sequence[Pack]]) -> list[list[Pack]]:
    """As many packs for every replica, and an even number."""
    most = max(map(len, replicas))
    return [[*packs, *[blank_pack()] * (most + most % 2 - len(packs))] for packs in replicas]


def cases_at(name: str, models: dict[str, Path], batch: Batch) -> list[Case]:
    layout = LAYOUTS[name]

    def steps(packs: list[Pack]) -> list[list[list[Pack]]]:
        return [[packs[:1], packs[1:]], [packs, []]] if layout.data == 2 else [[packs]] * 2

    cases = []
    for model in MODELS[name]:
        case = standard(f"{name}: {model}", models[model], [], batch.denominator)
        recompute = RECOMPUTE.get(name, "none")
        cases.append(replace(case, layout=layout, steps=steps(batch.packed), recompute=recompute))
    if name not in VARIANTS:
        return cases
    # A failed step must leave nothing behind: the results are those without it.
    cases[0] = replace(cases[0], spoilt=[spoilt(batch.packed), batch.packed][: layout.data])
    plain = replace(cases[0], spoilt=())
    return [
        *cases,
        replace(plain, name=f"{name}: flat", steps=steps(batch.flat)),
        replace(plain, name=f"{name}: masked", learning=MASKED),
        replace(plain, name=f"{name}: offload", offload="all"),
        replace(
            plain,
            name=f"{name}: bfloat16",
            dtype="bfloat16",
            steps=plain.steps[:1] * 12,
            optimizer=SMALL_STEPS,
        ),
        # A few tokens' logits at once, computed again in the backward pass by all ranks together.
        replace(plain, name=f"{name}: entropy", learning=BONUS, chunk_bytes=4096, recompute="full"),
        replace(plain, name=f"{name}: kl", learning=KL, steps=with_reference(plain.steps)),
    ]


def mixed_versions(packs: Sequence[Pack]) -> list[Pack]:
    """The packs as if each token of a segment had been sampled by other weights than the one before it."""
    return [
        replace(pack, version=np.where(pack.version >= 0, pack.offset % 3, -1).astype(np.int32))
        for pack in packs
    ]


def with_reference(steps: Sequence[Sequence[Sequence[Pack]]]) -> list[list[list[Pack]]]:
    """Any reference will do; `test_reference_...` checks that the trainer has the right one."""
    return [
        [[replace(pack, reference_log_prob=pack.old_log_prob) for pack in packs] for packs in replicas]
        for replicas in steps
    ]


def reference_log_probs(model: Path, tree: Tree) -> dict[tuple[int, int], float]:
    """Every token's log-prob by transformers, under its segment and offset; each trajectory by itself."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    values = {}
    for leaf in tree.leaves:
        tokens = torch.from_numpy(np.concatenate([tree.prompt, tree.response(leaf)])).long()
        with torch.no_grad():
            log_p = (network(tokens[None]).logits[0].float() / TEMPERATURE).log_softmax(-1)
        path = [(PROMPT, offset) for offset in range(len(tree.prompt))]
        path += [
            (s, offset) for s in tree.path(leaf.segment) for offset in range(len(tree.segments[s].tokens))
        ]
        for index in range(1, len(tokens)):
            values[path[index]] = float(log_p[index - 1, tokens[index]])
    return values


def assert_log_probs(packs: Sequence[Pack], log_probs: Sequence[np.ndarray], model: Path, trees) -> None:
    reference = [reference_log_probs(model, tree) for tree in trees]
    for pack, values in zip(packs, log_probs, strict=True):
        assert values.dtype == np.float32
        expected = [
            reference[tree][segment, offset] if source >= 0 else 0.0
            for tree, segment, offset, source in zip(
                pack.tree, pack.segment, pack.offset, pack.source, strict=True
            )
        ]
        np.testing.assert_allclose(values, expected, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_are_those_of_transformers(name: str, one_rank, models, batch) -> None:
    assert_log_probs(batch.packed, one_rank[name].before[0], models[name], batch.trees)


@pytest.mark.parametrize("name", CONFIGS)
def test_export_is_a_model_for_transformers(name: str, one_rank, models, batch) -> None:
    """After training: the exported folder gives the log-probs that the trainer gives."""
    result = one_rank[name]
    assert_log_probs(batch.packed, result.after[0], result.export, batch.trees)
    assert (result.export / "tokenizer_config.json").is_file()
    assert (result.export / "generation_config.json").is_file()
    exported = load_file(result.export / "model.safetensors")
    assert exported.keys() == load_file(models[name] / "model.safetensors").keys()


def test_training_changes_the_weights_and_the_clips_bind(one_rank) -> None:
    """Otherwise the comparisons below would prove nothing."""
    result = one_rank["qwen2"]
    for name, tensor in result.initial.items():
        assert not torch.equal(tensor, result.final[name]), name
    metrics = result.metrics[0]
    assert 0 < metrics["clip_high"] < 0.9
    assert 0 < metrics["clip_low"] < 0.9
    assert metrics["grad_norm"] > 0


def test_packed_and_flat_are_the_same_step(one_rank) -> None:
    assert_same_step(one_rank["flat"], one_rank["qwen2"])


@pytest.mark.parametrize("layout", VARIANTS)
def test_packed_and_flat_are_the_same_step_at_every_layout(layout: str, parallel) -> None:
    assert_same_step(parallel[f"{layout}: flat"], parallel[f"{layout}: qwen2"])


def test_packed_and_flat_mask_the_same_segments(one_rank) -> None:
    """Of which some are too likely and some too unlikely, and their tokens may be of several versions."""
    masked = one_rank["masked"]
    for metrics in masked.metrics:
        assert min(metrics["importance_above"], metrics["importance_below"]) > 0.05
        assert metrics["importance_above"] + metrics["importance_below"] < 0.9
    assert masked.metrics[0]["grad_norm"] != one_rank["qwen2"].metrics[0]["grad_norm"]
    assert_same_step(one_rank["masked, flat"], masked)
    assert_the_same_bits(one_rank["masked, versions"], masked)


@pytest.mark.parametrize("layout", VARIANTS)
def test_every_layout_masks_the_same_segments(layout: str, parallel, one_rank) -> None:
    assert_same_step(parallel[f"{layout}: masked"], one_rank["masked"])


@pytest.mark.parametrize("what", OFFLOADS)
def test_offloading_changes_no_bit(what: str, one_rank) -> None:
    """Nor does a checkpoint that is written and loaded while everything is away."""
    assert_the_same_bits(one_rank[f"offload {what}"], one_rank["qwen2"])


def test_offloading_master_weights_changes_no_bit(one_rank) -> None:
    assert_the_same_bits(one_rank["offload all, bfloat16"], one_rank["not offloaded, bfloat16"])


@pytest.mark.parametrize("layout", VARIANTS)
def test_offloading_changes_no_bit_at_any_layout(layout: str, parallel) -> None:
    assert_the_same_bits(parallel[f"{layout}: offload"], parallel[f"{layout}: qwen2"])


def test_padding_changes_nothing(one_rank) -> None:
    """Also more than a block of padding, which attends to nothing."""
    assert_same_step(one_rank["padded"], one_rank["qwen2"])
    for ours, reference in zip(one_rank["padded"].before[0], one_rank["qwen2"].before[0], strict=True):
        np.testing.assert_allclose(ours[: len(reference)], reference, **CLOSE)
        assert (ours[len(reference) :] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_that_of_transformers(name: str, one_rank, models, batch) -> None:
    """Autograd through transformers on whole trajectories: divided once, and clipped to norm 1."""
    network = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    # The padding token would have no gradient, and the trees use it.
    network.get_input_embeddings().padding_idx = None  # type: ignore[assignment]  # torch types it as a module
    for pack in batch.flat:
        total = torch.zeros(())
        for start in np.flatnonzero(pack.source < 0):
            total = total + trajectory_loss(network, pack, slice(start, pack.exit[start]), batch.denominator)
        total.backward()
    gradients = dict(saved_gradients(network))
    assert gradients.keys() == one_rank[name].final.keys()
    result = one_rank[f"{name}, one step"]
    assert_step_of(gradients, result)


@pytest.mark.parametrize("variant", ["full", "selective"])
def test_recomputation_changes_nothing(variant: str, one_rank) -> None:
    assert_same_step(one_rank[variant], one_rank["qwen2"])


def test_a_step_that_fails_changes_nothing(one_rank) -> None:
    assert_same_step(one_rank["spoilt"], one_rank["qwen2"])


def test_learning_rate_rises_linearly_and_stays(one_rank) -> None:
    rates = [metrics["learning_rate"] for metrics in one_rank["warm-up"].metrics]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    # Half a cosine from 1e-3 to 1e-4 over the three steps after the warm-up.
    rates = [metrics["learning_rate"] for metrics in one_rank["cosine"].metrics]
    assert rates == pytest.approx([1e-3, 7.75e-4, 3.25e-4, 1e-4, 1e-4])
    # Without a warm-up it falls from the first step on.
    rates = [metrics["learning_rate"] for metrics in one_rank["linear"].metrics]
    assert rates == pytest.approx([5e-4, 0, 0])


def test_the_loss_falls(one_rank) -> None:
    """With Adam as it is used: the same batch five times."""
    losses = [metrics["loss"] for metrics in one_rank["warm-up"].metrics]
    assert losses[-1] < losses[0]


def test_bfloat16_accumulates_steps_in_float32_master_weights(one_rank, models) -> None:
    result = one_rank["bfloat16"]
    saved = load_file(models["qwen2"] / "model.safetensors")
    for name, tensor in result.initial.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, saved[name].bfloat16()), name
    moved = (result.final["lm_head.weight"] != result.initial["lm_head.weight"]).float().mean()
    assert moved > 0.3
    # bfloat16 has 8 bits: logits of a few units are known to about 0.03.
    for ours, exact in zip(result.before[0], one_rank["qwen2"].before[0], strict=True):
        np.testing.assert_allclose(ours, exact, atol=0.2)


@pytest.mark.parametrize("layout", VARIANTS)
def test_bfloat16_takes_the_same_course_at_every_layout(layout: str, parallel, one_rank) -> None:
    ours, reference = parallel[f"{layout}: bfloat16"], one_rank["bfloat16"]
    for step, other in zip(ours.metrics, reference.metrics, strict=True):
        # Activations of 8 bits. The gradient's norm jumps if one more token is clipped; the loss does not.
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-2)
    assert ours.metrics[-1]["loss"] < 0.9 * ours.metrics[0]["loss"]  # enough for the comparison to see
    moved = (ours.final["lm_head.weight"] != ours.initial["lm_head.weight"]).float().mean()
    assert moved > 0.3  # else the master weights were not in float32


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_weights_survive_the_round_trip_bit_for_bit(
    layout: str, name: str, parallel, one_rank, models
) -> None:
    saved = load_file(models[name] / "model.safetensors")
    for result in (parallel[f"{layout}: {name}"], one_rank[name]):
        assert result.initial.keys() == saved.keys()
        for tensor, weight in saved.items():
            assert torch.equal(result.initial[tensor], weight), tensor


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_every_layout_is_one_rank(layout: str, name: str, parallel, one_rank) -> None:
    ours, reference = parallel[f"{layout}: {name}"], one_rank[name]
    assert_same_log_probs(ours, reference)
    assert_same_step(ours, reference)


@pytest.mark.parametrize("layout", VARIANTS)
def test_recomputation_and_chunks_change_nothing_at_any_layout(layout: str, parallel, one_rank) -> None:
    """With the entropy bonus, whose gradient also crosses the ranks' vocabularies."""
    assert one_rank["entropy"].metrics[0]["grad_norm"] != one_rank["qwen2"].metrics[0]["grad_norm"]
    assert_same_step(parallel[f"{layout}: entropy"], one_rank["entropy"])


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_export_is_what_the_engines_get(layout: str, name: str, parallel) -> None:
    result = parallel[f"{layout}: {name}"]
    exported = load_file(result.export / "model.safetensors")
    assert exported.keys() == result.final.keys()
    for tensor, weight in exported.items():
        assert torch.equal(weight, result.final[tensor])


@pytest.mark.parametrize("layout", VARIANTS)
def test_reference_is_the_initial_model_and_gives_way_to_the_trained_one(layout: str, parallel) -> None:
    result = parallel[f"{layout}: kl"]
    assert result.metrics[0]["reference_kl"] > 0
    values = [
        [array for replica in replicas for array in replica]
        for replicas in (result.before, result.reference, result.after)
    ]
    for before, reference, after in zip(*values, strict=True):
        np.testing.assert_array_equal(reference, before)
        assert not np.array_equal(after, before)


def test_the_batches_have_masked_segments(parallel) -> None:
    """Not each of their mini-batches: some have a single pack."""
    updates = [update for layout in BATCHES for update in parallel[f"{layout}: batch"][0].updates]
    assert sum(masked(update) > 0 for update in updates) > len(updates) / 2


def masked(update: Mapping[str, float]) -> float:
    return update["importance_below"] + update["importance_above"]


@pytest.mark.parametrize("layout", BATCHES)
def test_a_batch_is_its_log_probs_and_its_steps(layout: str, parallel) -> None:
    """Log-probs of the whole batch come before its first step, and no rank needs another's."""
    (result, final), (expected, other) = (parallel[f"{layout}: {way}"] for way in ("batch", "by hand"))
    assert result.mismatch.mean == pytest.approx(expected.mismatch.mean, rel=1e-6)
    assert result.mismatch.largest == pytest.approx(expected.mismatch.largest, rel=1e-5)
    assert result.mismatch.weight == expected.mismatch.weight > 0
    assert all(masked(update) < 0.95 for update in result.updates)
    for update, by_hand in zip(result.updates, expected.updates, strict=True):
        assert update.keys() == by_hand.keys()
        for key, value in by_hand.items():
            assert update[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert len(result.updates) == len(result.taken) == 2
    assert result.weights is not None
    assert expected.weights is not None
    assert result.weights.tokens == expected.weights.tokens > 0
    for measured in ("largest", "log_prob", "before"):
        assert getattr(result.weights, measured) == pytest.approx(
            getattr(expected.weights, measured), rel=1e-5
        ), measured
    for name, tensor in other.items():
        torch.testing.assert_close(final[name], tensor, **CLOSE, msg=name)
