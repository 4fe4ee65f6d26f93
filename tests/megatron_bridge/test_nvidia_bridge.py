"""NVIDIA's megatron-bridge loads the same Hugging Face weights into the same parameters.

`make oracle` installs it.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import megatron_ranks, nvidia_bridge
from tests.support.trainer_layouts import CONFIGS
from treepo.config.trainer import ParallelConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not nvidia_bridge.FOLDER.is_dir(),
        reason="megatron-bridge is not there: run `make oracle`",
    ),
]

NAMES = ["qwen2", "qwen3", "qwen3_moe", "llama", "mistral"]


def write(name: str, folder: Path) -> Path:
    """Every layer of a mixture has experts: the oracle maps no others."""
    config: Any = copy.deepcopy(CONFIGS[name])
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = []
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))  # norms and biases are constant at first
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Of every family, what differs on either of two tensor-parallel ranks, by parameter."""
    root = tmp_path_factory.mktemp("oracle")
    lives = [(name, nvidia_bridge.compare, write(name, root / name)) for name in NAMES]
    return megatron_ranks.run_lives(lives, ParallelConfig(tensor=2), root / "ranks")


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_the_oracles(name: str, differences: dict[str, dict[str, str]]) -> None:
    assert len(differences[name]) > 2 * CONFIGS[name].num_hidden_layers
    assert not {parameter: found for parameter, found in differences[name].items() if found}
