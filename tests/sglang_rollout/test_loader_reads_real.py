"""What SGLang's own loaders read of each tensor: dense models and experts, by tensor and by expert."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.loader_ranks import loader_faults
from tests.support.trainer_layouts import CONFIGS

pytestmark = pytest.mark.slow

FAMILIES = ("qwen2", "qwen2-tied", "llama", "qwen3, biased", "qwen3_moe", "qwen2_moe")


def written(name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random model of the tests, and other weights of it under the checkpoint's names."""
    config = deepcopy(CONFIGS[name])
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = []  # SGLang's models have experts in every layer
        config.moe_intermediate_size = 64  # 32 rows for each of two ranks: a CPU serves no fewer
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    return folder, {name: tensor + torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loader_reads_nothing_that_is_not_sent(ranks: int, tmp_path: Path) -> None:
    """Everything else is NaN. Two ranks read about half of the bytes each."""
    models: list[tuple[Path, dict[str, torch.Tensor], dict[str, Any]]] = []
    for name in FAMILIES:
        model = written(name, tmp_path / name)
        models.append((*model, {}))
        if ranks > 1 and hasattr(CONFIGS[name], "num_experts"):
            models.append((*model, {"ep_size": ranks}))
    for answers in loader_faults(models, ranks):
        for (folder, _, more), (faults, share) in zip(models, answers, strict=True):
            assert faults == [], (folder.name, more)
            assert share == 1 if ranks == 1 else share < 0.6, (folder.name, more, share)
