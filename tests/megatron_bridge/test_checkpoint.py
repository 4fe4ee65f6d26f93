"""Training checkpoints of Megatron-Core ranks: exact at the same layout, the same losses at any other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bridge.convert import to_checkpoint, to_hugging_face
from tests.support import checkpoint_ranks, megatron_ranks
from tests.support.checkpoint_ranks import VOCABULARY, Case, Result, some_packs
from tests.support.tiny import write_tiny_qwen2, write_tiny_qwen2_moe, write_tiny_qwen3_moe
from treepo.config.learning import LearningConfig
from treepo.config.trainer import OptimizerConfig, ParallelConfig
from treepo.errors import ModelError
from treepo.learning import loss
from treepo.training.checkpoint_manifest import MANIFEST, is_checkpoint, read_manifest

pytestmark = pytest.mark.slow

# Optimizer state and warm-up must affect the step. epsilon = 1 makes Adam's step nearly linear in them: the
# usual epsilon divides a gradient by its own size, which turns rounding noise near 0 into a full step.
ADAM = OptimizerConfig(learning_rate=0.5, warmup_steps=4, epsilon=1.0, betas=[0.9, 0.9], weight_decay=0.01)
LAYOUTS = {
    "one rank": ParallelConfig(),
    "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tensor 2, data 2": ParallelConfig(tensor=2, data=2, expert=2),
    "context 2": ParallelConfig(context=2, expert=2),
}
# Layouts add a few hundred float32 terms in different orders: a few 1e-6 of a loss or weight near 1.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
MODELS = ("dense", "dense, bfloat16", "experts", "shared expert")
ONE, INTERLEAVED, SPREAD, SLICED = LAYOUTS
# (model, the layout that saves, the layout that loads)
EXACT = [
    (model, layout, layout)
    for model in MODELS
    for layout in (LAYOUTS if model == "dense" else (SPREAD, SLICED))
]
OTHER = [("dense", saving, loading) for saving in LAYOUTS for loading in LAYOUTS if saving != loading]
OTHER += [("experts", SPREAD, ONE), ("experts", SPREAD, INTERLEAVED), ("experts", ONE, SPREAD)]
OTHER += [("shared expert", SPREAD, ONE), ("experts", SPREAD, SLICED), ("experts", SLICED, ONE)]
MASTERS = [("dense, bfloat16", SPREAD, ONE), ("dense, bfloat16", ONE, SPREAD)]
JOURNEYS = [*EXACT, *OTHER, *MASTERS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def cases(root: Path) -> dict[str, Case]:
    """Four steps of a dense model with tied embeddings, of which the last pipeline stage has a copy, and of
    models with experts, one of them with a shared expert.
    """
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 4}
    dense = write_tiny_qwen2(root / "dense", tie_word_embeddings=True, **sizes)
    experts = write_tiny_qwen3_moe(root / "experts", **sizes)
    shared = write_tiny_qwen2_moe(root / "shared expert", **sizes)
    packs = some_packs()
    assert len(packs) > 1
    case = Case(dense, packs, loss.denominator([packs], LearningConfig()), ADAM, steps=4)
    return {
        "dense": case,
        "dense, bfloat16": replace(case, dtype="bfloat16"),
        "experts": replace(case, model=experts, experts=True),
        "shared expert": replace(case, model=shared, experts=True),
    }


def saved(model: str, layout: str) -> str:
    return f"{model}, {layout}"


@pytest.fixture(scope="module")
def straight(cases: dict[str, Case], root: Path) -> dict[str, Any]:
    """Four steps without interruption at every layout that saves: a save begins after the second step and
    ends after the third. Also the errors of a full disk, at every layout.
    """
    results = {}
    for layout, parallel in LAYOUTS.items():
        models = {model for model, saving, _ in JOURNEYS if saving == layout}
        lives = []
        for name in sorted(models):
            case = replace(cases[name], save=root / saved(name, layout), save_after=2)
            lives.append((saved(name, layout), checkpoint_ranks.live, case))
        fails = replace(cases["dense"], save=root / f"{layout}, after failures")
        lives.append((f"fail, {layout}", checkpoint_ranks.fail, fails))
        results |= megatron_ranks.run_lives(lives, parallel, root / f"{layout}, straight")
    return results


@pytest.fixture(scope="module")
def resumed(cases: dict[str, Case], root: Path, straight) -> dict[tuple[str, str], Result]:
    """The last two steps from each checkpoint, by what was saved and the layout that loads."""
    assert straight
    to_checkpoint(cases["dense"].model, root / "imported")
    results = {}
    for layout, parallel in LAYOUTS.items():
        lives = []
        for model, saving, loading in JOURNEYS:
            if loading == layout:
                case = replace(cases[model], load=root / saved(model, saving), steps=2)
                lives.append((saved(model, saving), checkpoint_ranks.live, case))
        from_one = replace(cases["dense"], load=root / saved("dense", ONE), steps=2)
        imported = replace(cases["dense"], load=root / "imported", steps=2)
        lives.append(("imported", checkpoint_ranks.live, imported))
        lives.append(("reference", checkpoint_ranks.live, with_reference(from_one)))
        killed = replace(from_one, save=root / f"{layout}, killed", finish=False)
        lives.append(("killed", checkpoint_ranks.live, killed))
        outcome = megatron_ranks.run_lives(lives, parallel, root / f"{layout}, resumed")
        results |= {(life, layout): result for life, result in outcome.items()}
    return results


def with_reference(case: Case) -> Case:
    """The case with a reference model and no step."""
    packs = [replace(pack, reference_log_prob=pack.old_log_prob) for pack in case.packs]
    return replace(case, packs=packs, learning=LearningConfig(kl_coefficient=0.1), steps=0)


@pytest.mark.parametrize(("model", "saving", "layout"), EXACT)
def test_going_on_at_the_same_layout_is_exact(
    model: str, saving: str, layout: str, straight, resumed
) -> None:
    expected, ours = straight[saved(model, saving)], resumed[saved(model, saving), layout]
    assert ours.metrics == expected.metrics[2:]
    assert ours.final.keys() == expected.final.keys()
    for name, tensor in expected.final.items():
        assert torch.equal(ours.final[name], tensor), name
    table = "model.embed_tokens.weight"
    assert not torch.equal(ours.final[table], ours.start[table])


@pytest.mark.parametrize(("model", "saving", "layout"), OTHER)
def test_any_layout_goes_on_to_the_same_losses(
    model: str, saving: str, layout: str, straight, resumed, root: Path
) -> None:
    """The weights have the same bits; later steps differ by rounding. Lost optimizer state or a warm-up that
    began again would change the second step by a tenth and more.
    """
    ours, expected = resumed[saved(model, saving), layout], straight[saved(model, saving)]
    assert_same_weights(ours.start, root / saved(model, saving))
    for step, other in zip(ours.metrics, expected.metrics[2:], strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert step[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key
    for name, tensor in expected.final.items():
        torch.testing.assert_close(ours.final[name], tensor, **CLOSE, msg=name)


@pytest.mark.parametrize(("model", "saving", "layout"), MASTERS)
def test_float32_masters_of_bfloat16_weights_go_along(
    model: str, saving: str, layout: str, straight, resumed, root: Path
) -> None:
    ours = resumed[saved(model, saving), layout]
    assert_same_weights(ours.start, root / saved(model, saving))
    moved = differing = 0
    for name, tensor in straight[saved(model, saving)].final.items():
        moved += int((tensor != ours.start[name]).sum())
        differing += int((tensor != ours.final[name]).sum())
    # Master weights rounded to bfloat16 would lose what two steps added. bfloat16 activations add some noise.
    assert differing < 0.1 * moved


def assert_same_weights(weights: dict[str, Tensor], checkpoint: Path) -> None:
    """Compare with the weights that `treepo convert` reads from the checkpoint."""
    folder = checkpoint.with_name(f"{checkpoint.name}, converted")
    if not folder.exists():
        to_hugging_face(checkpoint, folder)
    converted = load_file(folder / "model.safetensors")
    assert weights.keys() == converted.keys()
    for name, tensor in converted.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_weights_train_as_the_model_folder_does(layout: str, straight, resumed) -> None:
    assert resumed["imported", layout].metrics == straight[saved("dense", layout)].metrics[:2]


def test_the_reference_is_the_model_that_training_began_with(cases, resumed) -> None:
    first, *others = [resumed["reference", layout].reference for layout in (ONE, INTERLEAVED)]
    case = cases["dense"]
    network = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    pack = case.packs[0]
    start = int(np.flatnonzero(pack.source < 0)[0])
    first_token = int(np.flatnonzero(pack.source == start)[0])
    log_prob = (
        network(torch.from_numpy(pack.token[None, start : start + 1]).long()).logits[0, -1].log_softmax(-1)
    )
    assert first[0][first_token] == pytest.approx(float(log_prob[pack.token[first_token]]), abs=1e-5)
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_a_checkpoint_says_what_it_holds(root: Path, straight) -> None:
    assert straight
    for layout, parallel in LAYOUTS.items():
        manifest = read_manifest(root / saved("dense", layout))
        assert manifest.dtype == "float32"
        assert manifest.optimizer_steps == 2
        assert manifest.layout == checkpoint_ranks.dense(parallel).model_dump()
        assert manifest.run == {"step": 2}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_ends_in_the_same_line_on_every_rank(layout: str, root: Path, straight) -> None:
    """Whichever rank has the full disk; `checkpoint_ranks.fail` compares the ranks. Later saves succeed."""
    of_rank_0, of_last_rank, of_export = straight[f"fail, {layout}"]
    for line in (of_rank_0, of_last_rank, of_export):
        assert line.startswith("CheckpointError: ")
        assert "File too large" in line
        assert "\n" not in line
    folder = root / f"{layout}, straight"
    left = {entry.name for entry in folder.iterdir() if entry.suffix != ".pickle"}
    assert left == {"export"}
    assert is_checkpoint(root / f"{layout}, after failures")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_save_is_no_checkpoint(layout: str, root: Path, resumed) -> None:
    assert resumed
    assert not (root / f"{layout}, killed").exists()
    with pytest.raises(ModelError, match=MANIFEST):
        read_manifest(root / f"{layout}, killed")
