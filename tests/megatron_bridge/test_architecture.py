"""The trainer reads a model's config, and refuses what it does not support before anything starts."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, Qwen2MoeConfig, Qwen3MoeConfig

from megatron_bridge.architecture import (
    Experts,
    UntrainableError,
    check_layout,
    check_routing_replay,
    check_transformer_impl,
    read_architecture,
)
from megatron_bridge.hf_weight_map import FAMILIES
from megatron_bridge.lacking_parts import REFUSED
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


def test_a_mistral_that_lists_its_layers_is_a_mistral(tiny_model: Path, tmp_path: Path) -> None:
    """Transformers calls it a Ministral; with full attention they are the same."""
    layers: dict[str, Any] = {"model_type": "mistral", "sliding_window": None}
    edited(tiny_model, tmp_path, **layers, layer_types=["full_attention"] * 2)
    assert read_architecture(tmp_path).model_type == "mistral"
    edited(tiny_model, tmp_path, **layers, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ModelError, match=r"layer_types has .sliding_attention.; only full_attention"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type = .gpt2. is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias = true; only false is supported"),  # Qwen2 has its own
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window = 8; only null is supported"),
        ({"model_type": "mistral", "sliding_window": None, "attention_bias": True}, "attention_bias = true"),
        ({"model_type": "llama", "bias": True}, "bias = true; only false"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tiny_model: Path, tmp_path: Path, changes, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_architecture(edited(tiny_model, tmp_path, **changes))


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        ({"model_type": "deepseek_v3"}, "multi-head latent attention"),
        ({"model_type": "gpt_oss"}, "sliding windows and attention sinks"),
        ({"model_type": "qwen3_next"}, "linear attention"),
        ({"model_type": "gemma2"}, "sliding windows and norms after attention and MLP"),
        ({"model_type": "granite"}, "multipliers"),
        ({"model_type": "glm4"}, "interleaved rotary positions of a part of each head"),
        # Families that no list has, by a key of theirs.
        ({"model_type": "new", "kv_lora_rank": 512}, "multi-head latent attention"),
        ({"model_type": "qwen2_vl", "vision_config": {"depth": 2}}, "part for images"),
    ],
)
def test_a_refused_family_is_told_what_is_missing(
    tiny_model: Path, tmp_path: Path, config: dict[str, Any], lacking: str
) -> None:
    said = (
        rf"model_type = .{config['model_type']}. is not supported \(the trainer has no {lacking}.*\); qwen2,"
    )
    with pytest.raises(UntrainableError, match=said) as raised:
        read_architecture(edited(tiny_model, tmp_path, **config))
    assert "\n" not in str(raised.value)


def test_lists_of_refused_families_have_no_misspelt_and_no_supported_name() -> None:
    of_sglang = {"kimi_k2", "kimi_linear", "minicpm3"}
    listed = [name for names in REFUSED.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(CONFIG_MAPPING.keys()) | of_sglang
    assert not FAMILIES.keys() & set(listed)


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


def test_only_a_model_with_experts_has_routes_to_replay(moe_folder: Path, tiny_model: Path) -> None:
    dense, mixture = read_architecture(tiny_model), read_architecture(moe_folder)
    check_routing_replay(tiny_model, dense, "none")
    for mode in ("trainer", "rollout"):
        check_routing_replay(moe_folder, mixture, mode)
        with pytest.raises(ConfigError) as raised:
            check_routing_replay(tiny_model, dense, mode)
        assert str(raised.value) == (
            f"trainer.routing_replay = {mode}, but the model of {tiny_model / 'config.json'} has no experts; "
            "none is allowed"
        )


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


def test_a_shared_expert_is_divided(tmp_path: Path) -> None:
    Qwen2MoeConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, shared_expert_intermediate_size=30
    ).save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    assert architecture.experts == Experts(intermediate=1408, per_token=4, normalised=False, shared=30)
    with pytest.raises(ConfigError, match="divide the model's 30 rows of the shared expert"):
        check_layout(architecture, ParallelConfig(tensor=4))
    edited(tmp_path, tmp_path, qkv_bias=False)
    with pytest.raises(ModelError, match="qkv_bias = false; only true is supported"):
        read_architecture(tmp_path)


def test_one_normalised_expert_a_token_is_refused(moe_folder: Path, tmp_path: Path) -> None:
    edited(moe_folder, tmp_path, num_experts_per_tok=1, norm_topk_prob=True)
    with pytest.raises(ModelError, match="num_experts_per_tok = 1 with norm_topk_prob"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "arithmetic"),
    [
        ({"virtual_pipeline": 2}, "but pipeline = 1"),
        (
            {"tensor": 2, "data": 3, "expert": 4},
            "2 x 1 x 3 = 6 ranks cannot be divided",
        ),
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
