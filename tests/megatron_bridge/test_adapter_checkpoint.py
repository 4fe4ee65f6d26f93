"""Checkpoints of adapters: exact at the same layout, the same at any other, without the base's weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bridge.convert import convert
from megatron_bridge.peft_folder import ADAPTER_WEIGHTS, read_adapter, write_adapter
from tests.support import checkpoint_ranks, megatron_ranks
from tests.support.checkpoint_ranks import VOCABULARY, Case, Result, some_packs
from tests.support.tiny import write_tiny_qwen2
from treepo.config.learning import LearningConfig
from treepo.config.trainer import LoraConfig, OptimizerConfig, ParallelConfig
from treepo.errors import ModelError
from treepo.learning import loss
from treepo.training.checkpoint_manifest import AdapterManifest, read_manifest

LORA = LoraConfig(rank=4, alpha=16.0)
# As in test_checkpoint: optimizer state and warm-up affect the step, nearly linearly.
ADAM = OptimizerConfig(learning_rate=0.5, warmup_steps=4, epsilon=1.0, betas=[0.9, 0.9], weight_decay=0.01)
LAYOUTS = {
    "one rank": ParallelConfig(),
    "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tensor 2, data 2": ParallelConfig(tensor=2, data=2),
    "context 2": ParallelConfig(context=2),
}
DTYPES = ("float32", "bfloat16")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def case(root: Path) -> Case:
    model = write_tiny_qwen2(root / "model", vocab_size=VOCABULARY, num_hidden_layers=4)
    packs = some_packs()
    return Case(model, packs, loss.denominator([packs], LearningConfig()), ADAM, steps=4, lora=LORA)


@pytest.fixture(scope="module")
def straight(case: Case, root: Path) -> dict[tuple[str, str], Result]:
    """Four steps at every layout, and a checkpoint after the second."""
    results = {}
    for layout, parallel in LAYOUTS.items():
        lives = []
        for dtype in DTYPES:
            saving = replace(case, dtype=dtype, save=root / f"{layout}, {dtype}", save_after=2)
            lives.append((dtype, checkpoint_ranks.live, saving))
        lives.append(
            ("end", checkpoint_ranks.live, replace(case, save=root / f"{layout}, end", save_after=4))
        )
        outcome = megatron_ranks.run_lives(lives, parallel, root / f"{layout}, straight")
        results |= {(layout, life): result for life, result in outcome.items()}
    return results


@pytest.fixture(scope="module")
def resumed(case: Case, root: Path, straight) -> dict[tuple[str, str, str], Result]:
    """The last two steps: by the layout that saved, the layout that loads, and dtype."""
    assert straight
    results = {}
    for layout, parallel in LAYOUTS.items():
        lives = []
        for saving in LAYOUTS:
            for dtype in DTYPES if saving == layout else DTYPES[:1]:
                load = root / f"{saving}, {dtype}"
                loading = replace(case, dtype=dtype, load=load, steps=2)
                lives.append((f"{saving}: {dtype}", checkpoint_ranks.live, loading))
        outcome = megatron_ranks.run_lives(lives, parallel, root / f"{layout}, resumed")
        for life, result in outcome.items():
            saving, _, dtype = life.partition(": ")
            results[saving, layout, dtype] = result
    return results


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_going_on_at_the_same_layout_is_exact(layout: str, dtype: str, straight, resumed) -> None:
    expected, ours = straight[layout, dtype], resumed[layout, layout, dtype]
    assert ours.metrics == expected.metrics[2:]
    for name, tensor in expected.adapters.items():
        assert torch.equal(ours.adapters[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("saving", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_goes_on_to_the_same_adapters(saving: str, layout: str, straight, resumed) -> None:
    """Lost optimizer state or a warm-up that began again would change the second step by a tenth and more."""
    expected, ours = straight[saving, "float32"], resumed[saving, layout, "float32"]
    for step, other in zip(ours.metrics, expected.metrics[2:], strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert step[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key
    for name, tensor in expected.adapters.items():
        torch.testing.assert_close(ours.adapters[name], tensor, **CLOSE, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_folders_are_the_trainers(layout: str, straight, root: Path) -> None:
    """Merged and as PEFT's, and the merge of PEFT's."""
    result, checkpoint = straight[layout, "end"], root / f"{layout}, end"
    merged, adapter, again = (root / f"{layout}, {what}" for what in ("merged", "adapter", "again"))
    assert convert(checkpoint, merged).what == "Hugging Face folder"
    assert convert(checkpoint, adapter, adapter=True).what == "PEFT adapter"
    convert(adapter, again)
    written = load_file(adapter / ADAPTER_WEIGHTS)
    assert written.keys() == result.adapters.keys()
    for name, tensor in result.adapters.items():
        assert torch.equal(written[name], tensor), name
    for folder in (merged, again):
        tensors = load_file(folder / "model.safetensors")
        assert tensors.keys() == result.final.keys()
        for name, tensor in result.final.items():
            # A product of other shape may round otherwise.
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.slow
def test_a_checkpoint_holds_adapters_alone(case: Case, straight, root: Path) -> None:
    """The adapters, and two averages and, for bfloat16, a master copy of them."""
    assert straight
    for layout in LAYOUTS:
        elements = sum(tensor.numel() for tensor in straight[layout, "float32"].adapters.values())
        for dtype, each in (("float32", 12), ("bfloat16", 14)):
            manifest = read_manifest(root / f"{layout}, {dtype}")
            assert manifest.adapters is not None
            assert manifest.adapters.lora == LORA
            assert manifest.adapters.base == str(case.model)
            written = sum(size for name, size in manifest.files.items() if name.startswith("trainer/__"))
            # Torch's files have about 1 KiB around each of their tensors.
            assert each * elements < written < each * elements + (1 << 21)
    assert (case.model / "model.safetensors").stat().st_size > 0


@pytest.mark.slow
def test_other_weights_and_other_adapters_are_refused(case: Case, straight, root: Path) -> None:
    assert straight
    checkpoint = root / "one rank, float32"
    lives = {
        "other rank": (case.model, LoraConfig(rank=5, alpha=16.0)),
        "none": (case.model, None),
        "other weights": (changed(case.model, root / "other"), LORA),
    }
    said = {}
    for name, (model, lora) in lives.items():
        loading = replace(case, model=model, lora=lora, load=checkpoint)
        said |= megatron_ranks.run_lives(
            [(name, checkpoint_ranks.refuse, loading)], LAYOUTS["one rank"], root / f"refused, {name}"
        )
    assert "but adapters with trainer.lora = {'rank': 5" in said["other rank"]
    assert "but the weights of the whole model are trained" in said["none"]
    assert "beside other weights than those in" in said["other weights"]


def changed(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of two projections beside a tiny model."""
    model = write_tiny_qwen2(tmp_path / "model")
    lora = LoraConfig(rank=2, alpha=4.0, targets=["q_proj", "down_proj"])
    tensors = {}
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}"
        for name, rows, columns in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 96)):
            tensors[f"{path}.{name}.lora_A.weight"] = torch.randn(2, columns)
            tensors[f"{path}.{name}.lora_B.weight"] = torch.randn(rows, 2)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, tensors, lora, model)
    return folder


def test_an_adapter_merges_in_float32_and_the_rest_stays(adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "merged")
    before = load_file(tmp_path / "model" / "model.safetensors")
    after, matrices = load_file(tmp_path / "merged" / "model.safetensors"), read_adapter(adapter).tensors()
    for name, tensor in before.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" not in matrices:
            assert torch.equal(after[name], tensor), name
            continue
        product = matrices[f"{path}.lora_B.weight"] @ matrices[f"{path}.lora_A.weight"]
        torch.testing.assert_close(after[name], tensor + 2.0 * product)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"LORA"', '"LOHA"', 'peft_type = "LOHA"; only LORA is supported'),
        ('"bias": "none"', '"bias": "all"', 'bias = "all" is not supported: only plain LoRA is'),
        ('"r"', '"use_dora": true, "r"', "use_dora = true is not supported: only plain LoRA is"),
        ('"r"', '"init_lora_weights": "pissa", "r"', 'init_lora_weights = "pissa" is not supported'),
        ('"r": 2', '"r": 2.5', "r: "),
        ('"r": 2', '"r": 0', "r: "),
        ('"r": 2', '"r": 3', "lora_A.weight is (2, 64), not (3, 64)"),
        ('"q_proj"', '"qkv_proj"', "target_modules: "),
        ('"q_proj"', '"k_proj"', "no tensor base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"),
        ("/model", "/nowhere", "is no model folder on this machine"),
    ],
)
def test_what_an_adapter_cannot_be_is_said_in_one_line(
    old: str, new: str, said: str, adapter: Path, tmp_path: Path
) -> None:
    path = adapter / "adapter_config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ModelError) as error:
        convert(adapter, tmp_path / "merged")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_adapters_has_none_to_convert(tmp_path: Path) -> None:
    model = write_tiny_qwen2(tmp_path / "model")
    convert(model, tmp_path / "checkpoint")
    with pytest.raises(ModelError, match="is no training checkpoint with adapters"):
        convert(tmp_path / "checkpoint", tmp_path / "adapter", adapter=True)


def test_a_manifest_says_which_weights_its_adapters_need(tmp_path: Path) -> None:
    model = write_tiny_qwen2(tmp_path / "model")
    manifest = AdapterManifest.of(LORA, model)
    manifest.check_base(model, tmp_path / "step-00001")
    with pytest.raises(ModelError, match=r"beside other weights than those in .*/other"):
        manifest.check_base(changed(model, tmp_path / "other"), tmp_path / "step-00001")
    with pytest.raises(ModelError, match="which is not on this machine"):
        manifest.check_base(tmp_path / "gone", tmp_path / "step-00001")
