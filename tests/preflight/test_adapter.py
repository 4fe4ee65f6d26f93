"""An adapter is served as a whole model, which is gone afterwards."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bridge.peft_folder import write_adapter
from tests.support.tiny import write_tiny_qwen2
from treepo.config.evaluate import EvalConfig
from treepo.config.trainer import LoraConfig
from treepo.errors import ConfigError
from treepo.preflight.adapter import with_adapter_merged


def config_of(model: Path, max_prompt_tokens: int = 8) -> EvalConfig:
    data = {"benchmarks": [{"path": "unused.jsonl"}], "max_prompt_tokens": max_prompt_tokens}
    sampling = {"max_response_tokens": 8}
    return EvalConfig.model_validate(
        {"out": "unused", "model": {"path": model}, "data": data, "sampling": sampling}
    )


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of the model in the folder `base` beside it."""
    base, adapter = write_tiny_qwen2(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    names = [f"base_model.model.model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 64) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.ones(64, 1) for name in names}
    write_adapter(adapter, tensors, LoraConfig(rank=1, alpha=3.0, targets=["o_proj"]), base)
    return adapter


def test_an_adapter_is_merged_while_it_is_served(adapter: Path) -> None:
    base = adapter.with_name("base")
    config = config_of(adapter)
    with with_adapter_merged(config) as served:
        folder = served.model.path
        assert folder is not None
        before, after = (load_file(path / "model.safetensors") for path in (base, folder))
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor + 3.0 * name.endswith("o_proj.weight"))
    assert not folder.exists()
    assert config.model.path == adapter


def test_an_error_names_the_base_and_no_temporary_folder(adapter: Path) -> None:
    base = adapter.with_name("base")
    with (
        pytest.raises(ConfigError, match=f"but {base} has .* positions"),
        with_adapter_merged(config_of(adapter, max_prompt_tokens=1 << 20)),
    ):
        pass


def test_a_model_is_served_as_it_is(tmp_path: Path) -> None:
    config = config_of(write_tiny_qwen2(tmp_path / "base"))
    with with_adapter_merged(config) as served:
        assert served is config
