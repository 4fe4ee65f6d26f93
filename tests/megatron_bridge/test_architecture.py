"""The trainer reads a model's config, and refuses what it does not support before anything starts."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import Qwen3MoeConfig

from megatron_bridge.architecture import Experts, check_layout, check_transformer_impl, read_architecture
from treepo.config.trainer import ParallelConfig
from treepo.errors import ConfigError, ModelError


def edited(tiny_model: Path, folder: Path, **changes: object) -> Path:
    config = json.loads((tiny_model / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sizes(tiny_model: Path) -> None:
    architecture = read_architecture(tiny_model)
    assert (architecture.hidden, architecture.heads, architecture.dimensions.groups) == (64, 4, 2)
    assert architecture.dimensions.head_dim == 16
    assert architecture.frequency.shape == (8,)
    assert not architecture.tied


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type = .gpt2. is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tiny_model: Path, tmp_path: Path, changes, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_architecture(edited(tiny_model, tmp_path, **changes))


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "arithmetic"),
    [
        ({"tensor": 3}, "trainer.parallel.tensor = 3 does not divide the model's 4 attention heads"),
        ({"tensor": 4}, "trainer.parallel.tensor = 4 does not divide the model's 2 key-value heads"),
        ({"pipeline": 3}, "trainer.parallel.pipeline = 3 does not divide the model's 2 layers"),
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            "trainer.parallel.pipeline x virtual_pipeline = 2 x 2 = 4 does not divide the model's 2 layers",
        ),
        ({"data": 2, "expert": 2}, "trainer.parallel.expert = 2, but the model has no experts"),
    ],
)
def test_a_layout_that_does_not_divide_shows_the_arithmetic(
    tiny_model: Path, layout: dict[str, Any], arithmetic: str
) -> None:
    with pytest.raises(ConfigError, match=arithmetic):
        check_layout(read_architecture(tiny_model), ParallelConfig(**layout))


@pytest.fixture
def moe_folder(tmp_path: Path) -> Path:
    """Three layers, of which the second is dense; six experts."""
    config = Qwen3MoeConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_experts_are_read(moe_folder: Path) -> None:
    architecture = read_architecture(moe_folder)
    assert architecture.dimensions.experts == 6
    assert architecture.dimensions.sparse_layers == (0, 2)
    assert architecture.experts == Experts(intermediate=768, per_token=2, normalised=False)


@pytest.mark.parametrize(
    ("layout", "arithmetic"),
    [
        ({"data": 4, "expert": 4}, "trainer.parallel.expert = 4 does not divide the model's 6 experts"),
        ({"tensor": 2, "sequence": False}, "needs trainer.parallel.sequence = true"),
    ],
)
def test_experts_that_cannot_be_divided(moe_folder: Path, layout: dict[str, Any], arithmetic: str) -> None:
    with pytest.raises(ConfigError, match=arithmetic):
        check_layout(read_architecture(moe_folder), ParallelConfig(**layout))


def test_one_normalised_expert_a_token_is_refused(moe_folder: Path, tmp_path: Path) -> None:
    edited(moe_folder, tmp_path, num_experts_per_tok=1, norm_topk_prob=True)
    with pytest.raises(ModelError, match="num_experts_per_tok = 1 with norm_topk_prob"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "arithmetic"),
    [
        ({"virtual_pipeline": 2}, "but pipeline = 1"),
        ({"tensor": 2, "data": 3, "expert": 4}, "tensor x data = 2 x 3 = 6 ranks cannot be divided"),
    ],
)
def test_a_layout_that_no_model_has(layout: dict[str, Any], arithmetic: str) -> None:
    with pytest.raises(ValidationError, match=arithmetic):
        ParallelConfig(**layout)


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
def test_transformer_engine_asked_for_and_absent() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.transformer_impl = te, but"):
        check_transformer_impl("te")
    check_transformer_impl("auto")
