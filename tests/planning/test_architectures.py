"""Shapes in examples/architectures have the published models' numbers of parameters."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bridge.architecture import check_layout, read_architecture
from tests.support.paths import ROOT
from treepo.config.load import load_config
from treepo.planning.fit import fit
from treepo.toy.recipe import MIXTURE, RECIPE
from treepo.toy.warmstart import new_model

EXAMPLES = ROOT / "examples"
ARCHITECTURES = EXAMPLES / "architectures"

TOYS = {"toy": RECIPE, "toy-moe": MIXTURE}
PARAMETERS = {  # safetensors' count on the models' pages; the toy's own
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    **{
        name: sum(parameter.numel() for parameter in new_model(0, recipe.experts).parameters())
        for name, recipe in TOYS.items()
    },
}


def test_every_architecture_is_counted() -> None:
    assert sorted(folder.name for folder in ARCHITECTURES.iterdir()) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ARCHITECTURES / name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


# Paths in a configuration are relative to the working directory; the examples assume the repository's.
PLANNED = [
    EXAMPLES / "quickstart.yaml",
    EXAMPLES / "quickstart-moe.yaml",
    *(path for path in sorted(EXAMPLES.rglob("*.yaml")) if path.parent.name in ("paper", "models")),
]


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.name)
def test_the_examples_divide_their_models_and_fit_their_devices(path: Path) -> None:
    config = load_config(path)
    assert config.plan.architecture is not None
    folder = EXAMPLES.parent / config.plan.architecture
    check_layout(read_architecture(folder), config.trainer.parallel)
    fitted = fit(config, folder)
    assert fitted.problem is None
    if config.plan.device != "cpu":  # no node is left with idle devices
        assert fitted.footprint.devices == fitted.footprint.nodes * config.plan.devices_per_node


@pytest.mark.parametrize("name", TOYS)
def test_the_toys_shape_is_what_treepo_toy_makes(name: str) -> None:
    made = new_model(0, TOYS[name].experts).config.to_dict()
    written = AutoConfig.from_pretrained(ARCHITECTURES / name).to_dict()
    keys = ("hidden_size", "rope_parameters", "eos_token_id", "vocab_size")
    assert {key: written[key] for key in keys} == {key: made[key] for key in keys}
    assert written.get("num_experts_per_tok") == made.get("num_experts_per_tok")
