"""The real engine serves every family that the trainer trains, and takes its weights under the trainer's
names.

The shared engine of the other tests serves Qwen2; each of these starts its own.
"""

import asyncio
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_bridge.architecture import read_architecture, tensor_shapes
from tests.support.trainer_layouts import CONFIGS

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # as in test_engine.py
CONTEXT = np.arange(20, 50, dtype=np.int32)
NAMES = ["mistral", "llama, biased", "qwen3, biased", "qwen3_moe, biased", "qwen2_moe"]


def write(name: str, folder: Path) -> Path:
    """Every layer of a mixture has experts: SGLang knows no other models. Logits of about one unit, as in
    `real_engine.write_model`.
    """
    config: Any = copy.deepcopy(CONFIGS[name])
    config.initializer_range = 0.1
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = []
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def assert_agrees(real: "RealEngine") -> None:
    output = real.generate(CONTEXT)
    assert output.version == real.engine.version
    np.testing.assert_allclose(output.log_probs, real.log_probs(CONTEXT, output.tokens, 1.0), atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_samples_and_takes_weights(name: str, tmp_path: Path) -> None:
    from tests.support import real_engine

    folder = write(name, tmp_path / "model")
    with asyncio.Runner() as runner:
        real = real_engine.start(folder, runner.get_loop())
        try:
            assert_agrees(real)
            weights = {
                key: tensor + 0.02 * torch.randn_like(tensor)
                for key, tensor in load_file(folder / "model.safetensors").items()
            }
            assert weights.keys() == tensor_shapes(read_architecture(folder)).keys()
            before = real.run(real.engine.log_probs(CONTEXT))
            real.run(real_engine.update(real.engine, weights))
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            real.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            assert np.abs(real.run(real.engine.log_probs(CONTEXT)) - before).max() > 0.01
            assert_agrees(real)
        finally:
            real.engine.close()
