"""An adapter is served as a whole model, which is gone afterwards."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_bridge.peft_folder import write_adapter
from tests.support.tiny import write_tiny_qwen2
from treepo.config.evaluate import EvalConfig
from treepo.config.trainer import LoraConfig
from treepo.preflight.adapter import with_adapter_merged


def config_of(model: Path) -> EvalConfig:
    return EvalConfig.model_validate(
        {"out": "unused", "model": {"path": model}, "data": {"benchmarks": [{"path": "unused.jsonl"}]}}
    )


def test_an_adapter_is_merged_while_it_is_served(tmp_path: Path) -> None:
    base, adapter = write_tiny_qwen2(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    names = [f"base_model.model.model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 64) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.ones(64, 1) for name in names}
    write_adapter(adapter, tensors, LoraConfig(rank=1, alpha=3.0, targets=["o_proj"]), base)
    config = config_of(adapter)
    with with_adapter_merged(config) as served:
        folder = served.model.path
        assert folder is not None
        before, after = (load_file(path / "model.safetensors") for path in (base, folder))
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor + 3.0 * name.endswith("o_proj.weight"))
    assert not folder.exists()
    assert config.model.path == adapter


def test_a_model_is_served_as_it_is(tmp_path: Path) -> None:
    config = config_of(write_tiny_qwen2(tmp_path / "base"))
    with with_adapter_merged(config) as served:
        assert served is config
