"""Shards of any layout, built without memory: exact counts, no tensor lost or repeated."""

import random
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_bridge.architecture import read_architecture, tensor_shapes
from megatron_bridge.hf_weight_map import EMBEDDING, OUTPUT
from megatron_bridge.layout_shards import (
    Shard,
    check_shards,
    expert_data_ranks,
    fake_ranks,
    layout_shards,
)
from megatron_bridge.runtime import on_device
from treepo.config.trainer import ParallelConfig
from treepo.errors import ConfigError, ModelError

SIZES: dict[str, Any] = {
    "vocab_size": 509,  # prime: padded at every size
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0, 5],
    "head_dim": 12,
}
KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, SIZES),
    "qwen3": (Qwen3Config, SIZES | {"head_dim": 12}),
    "llama": (LlamaConfig, SIZES | {"head_dim": 10}),
    "llama, biased": (LlamaConfig, SIZES | {"attention_bias": True}),
    "qwen2_moe": (Qwen2MoeConfig, SIZES | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": (Qwen3MoeConfig, SIZES | EXPERTS),
}
DIVISORS = {
    "tensor": [1, 2, 4, 8],
    "context": [1, 1, 2, 4],
    "pipeline": [1, 2, 4, 8],
    "data": [1, 2, 3, 8, 16],
    "expert": [1, 2, 8, 16],
}


def write_config(kind: str, tied: bool, folder: Path) -> Path:
    make, sizes = KINDS[kind]
    make(**{**sizes, "tie_word_embeddings": tied}).save_pretrained(folder)
    return folder


def random_layout(rng: random.Random, experts: bool) -> ParallelConfig:
    while True:
        chosen: dict[str, Any] = {name: rng.choice(sizes) for name, sizes in DIVISORS.items()}
        if not experts:
            chosen["expert"] = 1
        if chosen["tensor"] * chosen["context"] * chosen["data"] % chosen["expert"]:
            continue
        chunks = rng.choice([1, 2, 4]) if chosen["pipeline"] > 1 else 1
        if 8 % (chosen["pipeline"] * chunks) == 0:
            return ParallelConfig(**chosen, virtual_pipeline=chunks)


def counted_by_transformers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensors as they are saved: transformers fuses experts for computing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        layer, fused, part = name.partition("experts.")
        if not fused:
            shapes[name] = tuple(parameter.shape)
            continue
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
        experts, rows, columns = parameter.shape
        for expert in range(experts):
            for each in names:
                shapes[f"{layer}experts.{expert}.{each}.weight"] = (rows // len(names), columns)
    return shapes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_random_layouts_are_the_model_of_transformers(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    """Ranks together hold each parameter once.

    By design not: norms, routers, gates, output biases, the last stage's copy of tied embeddings, the
    vocabulary's padding.
    """
    architecture = read_architecture(write_config(kind, tied, tmp_path))
    expected = counted_by_transformers(tmp_path)
    assert tensor_shapes(architecture) == expected
    rng = random.Random(f"{kind}{tied}")
    for _ in range(3):
        parallel = random_layout(rng, architecture.experts is not None)
        shards = layout_shards(architecture, parallel)
        assert [shard.stage for shard in shards] == list(range(parallel.pipeline))
        total = sum(map(prod, expected.values()))
        rows = -509 % parallel.tensor * 64 * (1 if tied else 2)
        if tied and parallel.pipeline > 1:
            rows += -509 % parallel.tensor * 64 + 509 * 64
        replicated = sum(
            (parallel.tensor - 1) * each.elements
            for shard in shards
            for each in shard.parameters
            if any(part in each.name for part in ("norm", "router", "linear_proj.bias", "gate_weight"))
        )
        held = sum(
            parallel.tensor * shard.elements(expert=False) + parallel.expert * shard.elements(expert=True)
            for shard in shards
        )
        assert held == total + rows + replicated, parallel


def test_a_thousand_fake_ranks_leave_nothing_behind(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "vocab_size": 128256,
    }
    LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8).save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    random_state = torch.get_rng_state()
    parallel = ParallelConfig(tensor=8, pipeline=4, data=32)
    assert parallel.ranks == 1024
    shards = layout_shards(architecture, parallel)
    assert sum(map(prod, tensor_shapes(architecture).values())) == 70_553_706_496
    first, *middle, last = (shard.elements() for shard in shards)
    assert len(set(middle)) == 1
    assert last == first + 8192  # the final norm
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert layout_shards(architecture, ParallelConfig(pipeline=2))  # another one in the same process


def test_tied_embeddings_are_on_the_first_and_last_stage(tmp_path: Path) -> None:
    architecture = read_architecture(write_config("qwen2", True, tmp_path))
    shards = layout_shards(architecture, ParallelConfig(pipeline=4))
    names = [{each.name for each in shard.parameters} for shard in shards]
    assert [EMBEDDING in stage for stage in names] == [True, False, False, False]
    assert [OUTPUT in stage for stage in names] == [False, False, False, True]
    (alone,) = layout_shards(architecture, ParallelConfig(tensor=2))
    assert OUTPUT not in {each.name for each in alone.parameters}


def test_experts_are_marked_and_divided(tmp_path: Path) -> None:
    architecture = read_architecture(write_config("qwen3_moe", False, tmp_path))
    (shard,) = layout_shards(architecture, ParallelConfig(tensor=2, data=4, expert=4))
    assert expert_data_ranks(ParallelConfig(tensor=2, data=4, expert=4)) == 2
    for each in shard.parameters:
        assert each.expert == ("local_experts" in each.name), each
    assert {
        each.name.split("local_experts.")[1].split(".")[0] for each in shard.parameters if each.expert
    } == {"0", "1", "2", "3"}


def edited(shards: list[Shard], stage: int, edit) -> list[Shard]:
    """The shards with one stage's parameters edited."""
    chunks = tuple(tuple(edit(list(chunk))) for chunk in shards[stage].chunks)
    return [*shards[:stage], replace(shards[stage], chunks=chunks), *shards[stage + 1 :]]


def test_shards_that_are_not_the_model_are_refused(tmp_path: Path) -> None:
    architecture = read_architecture(write_config("qwen2", True, tmp_path))
    parallel = ParallelConfig(tensor=2, pipeline=2)
    shards = layout_shards(architecture, parallel)

    def lose(chunk):
        return chunk[:-1]

    def repeat(chunk):
        return [*chunk, chunk[-2]]

    def resize(chunk):
        rows, *others = chunk[2].shape
        return [*chunk[:2], replace(chunk[2], shape=(2 * rows, *others)), *chunk[3:]]

    check_shards(shards, architecture, parallel)
    for stage, edit, named in (
        (0, lose, "no rank has model.layers.3"),
        (1, lose, "no copy of the embedding"),
        (1, repeat, "pipeline stage 1 has model.norm.weight"),
        (0, resize, "pipeline stage 0 has model.layers.0"),
    ):
        with pytest.raises(ModelError, match=named):
            check_shards(edited(shards, stage, edit), architecture, parallel)


@pytest.mark.parametrize(
    ("layout", "arithmetic"),
    [
        ({"tensor": 16}, "does not divide the model's 8 key-value heads"),
        ({"pipeline": 3}, "does not divide the model's 8 layers"),
        ({"pipeline": 2, "virtual_pipeline": 3}, "2 x 3 = 6 does not divide the model's 8 layers"),
    ],
)
def test_layouts_that_do_not_divide(layout: dict[str, Any], arithmetic: str, tmp_path: Path) -> None:
    architecture = read_architecture(write_config("llama", False, tmp_path))
    with pytest.raises(ConfigError, match=arithmetic):
        layout_shards(architecture, ParallelConfig(**layout))
    assert not dist.is_initialized()


def test_replicas_are_numbered_as_megatron_core_numbers_them() -> None:
    """Packs are sent to a replica's ranks before they have any groups."""
    parallel = ParallelConfig(tensor=2, context=3, pipeline=2, data=2)
    firsts = []
    for rank in range(parallel.ranks):
        with on_device(), torch.random.fork_rng(devices=[]), fake_ranks(parallel, rank):
            assert parallel_state.get_data_parallel_rank() == parallel.replica(rank)
            assert parallel_state.get_context_parallel_rank() == rank // parallel.tensor % parallel.context
            within = (
                parallel_state.get_context_parallel_rank() + parallel_state.get_tensor_model_parallel_rank()
            )
            if within == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0:
                firsts.append(rank)
    assert firsts == list(range(0, parallel.stage_ranks, parallel.replica_ranks))
