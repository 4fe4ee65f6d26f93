"""Properties of planned trainer memory at any size; test_memory.py compares it with real ranks."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3MoeConfig

from megatron_bridge.architecture import read_architecture
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.planning.fit import Fit, fit
from treepo.planning.hardware import GIB
from treepo.planning.memory.host import trainer_node
from treepo.planning.memory.parts import Memory
from treepo.planning.memory.trainer import (
    checkpoint_bytes,
    kept_while_sampling,
    parameter_count,
    trainer_memory,
)
from treepo.planning.memory.weight_sync import bucket_bytes, exported_bytes

PARAMETERS = 8_030_261_248  # Llama 3.1 8B


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(folder)
    return folder


def config_of(trainer: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "out": "unused",
            "steps": 1,
            "model": {"path": "unused", "dtype": "bfloat16"},
            "data": {"train": "unused", "prompts_per_step": 64},
            "trainer": trainer or {},
        }
        | sections
    )


def fullest(config: RunConfig, folder: Path) -> Memory:
    return max(trainer_memory(config, folder), key=lambda memory: memory.total)


def host(config: RunConfig, folder: Path) -> Memory:
    *stages, _ = trainer_memory(config, folder)
    return trainer_node(config, folder, stages)


def test_one_rank_holds_eighteen_bytes_a_parameter(llama: Path) -> None:
    """bfloat16 weights, float32 gradients, master weights and two averages."""
    stage, update = trainer_memory(config_of(), llama)
    state = {name: stage.parts[name] for name in ("weights", "gradients", "optimizer")}
    for name, size in {"weights": 2, "gradients": 4, "optimizer": 12}.items():
        assert state[name] == pytest.approx(size * PARAMETERS, rel=1e-4)
    assert parameter_count(llama) == PARAMETERS
    assert exported_bytes(config_of(), llama) == 2 * PARAMETERS
    assert checkpoint_bytes(config_of(), llama) == 14 * PARAMETERS
    assert {name: update.parts[name] for name in state} == state
    assert "activations" not in update.parts


@pytest.mark.parametrize(
    ("offload", "away"), [("none", ()), ("optimizer", ("optimizer",)), ("all", ("weights", "optimizer"))]
)
def test_engines_that_share_devices_get_what_is_offloaded(offload: str, away: tuple[str, ...], llama) -> None:
    """Gradients always, and in a sync everything but the weights; the host holds what is away."""
    config = config_of({"offload": offload}, plan={"device": "h100"})
    stage, update = trainer_memory(config, llama, shared=True)
    assert set(kept_while_sampling(config)) == {"weights", "optimizer"} - set(away)
    assert update.parts["weights"] == stage.parts["weights"]
    assert "gradients" not in update.parts
    assert ("optimizer" in update.parts) == ("optimizer" not in away)
    held = host(config, llama).parts
    assert held.get("trainer.offload", 0) == sum(stage.parts[name] for name in away)


def test_offloading_leaves_more_to_the_cache_of_engines_that_share_devices(llama: Path) -> None:
    def cache(placement: str, offload: str) -> int:
        trainer = {"offload": offload, "recompute": "full", "parallel": {"tensor": 2, "data": 4}}
        plan = {"device": "h200", "node_memory_gib": 2000}
        config = config_of(trainer, plan=plan, placement=placement, engine={"count": 8})
        return fit(config, llama).engine.kv_tokens

    shared = [cache("colocated", offload) for offload in ("none", "optimizer", "all")]
    assert shared == sorted(set(shared))
    assert len({cache("split", offload) for offload in ("none", "optimizer", "all")}) == 1


def test_more_recomputation_keeps_less(llama: Path) -> None:
    """On CUDA, recomputing attention alone saves the copies of keys and values of grouped heads."""
    for device in ("cpu", "h100"):
        full, selective, none = (
            fullest(config_of({"recompute": recompute}, plan={"device": device}), llama).parts["activations"]
            for recompute in ("full", "selective", "none")
        )
        assert full == 32 * 16384 * 4096 * 2  # every layer's input
        assert full < selective < none


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_way_of_dividing_takes_memory_off_a_rank(recompute: str, llama: Path) -> None:
    alone = fullest(config_of({"recompute": recompute}), llama)
    for layout in ({"tensor": 2}, {"context": 2}, {"pipeline": 2}, {"data": 2}):
        divided = fullest(config_of({"recompute": recompute, "parallel": layout}), llama)
        assert divided.total < alone.total, layout
    data = fullest(config_of({"recompute": recompute, "parallel": {"data": 4}}), llama)
    assert data.parts["optimizer"] == pytest.approx(alone.parts["optimizer"] / 4, rel=1e-4)
    assert data.parts["activations"] == alone.parts["activations"]
    context = trainer_memory(config_of({"recompute": recompute, "parallel": {"context": 4}}), llama)[0]
    assert context.parts["weights"] == alone.parts["weights"]
    assert context.parts["optimizer"] == data.parts["optimizer"]
    # Without recomputation each rank keeps every query head's copy of all slices' keys and values.
    kept = context.parts["activations"] / alone.parts["activations"]
    assert kept == pytest.approx(0.25) if recompute != "none" else 0.25 < kept < 0.75


def test_stages_hold_fewer_micro_batches_from_first_to_last(llama: Path) -> None:
    stages = trainer_memory(config_of({"parallel": {"pipeline": 4}, "recompute": "full"}), llama)[:-1]
    kept = [stage.parts["activations"] for stage in stages]
    assert kept == sorted(kept, reverse=True)
    assert [stage.owner for stage in stages] == [f"trainer, pipeline stage {i}" for i in range(4)]
    assert all(stage.parts.keys() == stages[0].parts.keys() for stage in stages)
    assert all(stage.notes.keys() <= stage.parts.keys() for stage in stages)


def test_logits_are_bounded_whatever_the_pack(llama: Path) -> None:
    """512 MiB of float32 logits at once, their gradient, and an empty gradient of the output matrix."""
    trainer = {"parallel": {"pipeline": 4}, "recompute": "full", "max_tokens_per_pack": 65536}
    *_, last, _ = trainer_memory(config_of(trainer), llama)
    hidden = 65536 * 4096 * 2
    assert last.parts["logits"] < 1.25 * GIB + 128256 * 4096 * 2 + 5 * hidden


def test_host_memory_is_of_the_fullest_node(llama: Path) -> None:
    """Rank 0's node also has the outgoing weights; a reference is two copies while it computes."""
    parallel = {"tensor": 4, "data": 4}
    plain = host(config_of({"parallel": parallel}, weights={"transport": "disk"}), llama)
    assert plain.parts["outgoing weights"] == 4 * GIB  # one file of an exported folder
    lanes = host(config_of({"parallel": parallel}, weights={"transport": "host_broadcast"}), llama)
    gate_and_up = 2 * 2 * 14336 * 4096  # a parameter larger than a lane's bucket: two for each of eight lanes
    assert 16 * gate_and_up < lanes.parts["outgoing weights"] < 16 * gate_and_up + 2 * 2 * 128256 * 4096
    assert plain.parts["checkpoint being written"] == pytest.approx(
        8 * (2 + 12 / 4) * PARAMETERS / 4, rel=1e-3
    )
    kl = host(config_of({"parallel": parallel}, learning={"kl_coefficient": 0.1}), llama)
    assert kl.parts["reference weights"] == pytest.approx(8 * 2 * 2 * PARAMETERS / 4, rel=1e-3)
    none = host(config_of({"parallel": parallel}, checkpoint={"every": None}), llama)
    assert "checkpoint being written" not in none.parts


def test_buckets_are_on_the_device_if_they_are_sent_from_there(llama: Path) -> None:
    """Two of 256 MiB, except that the vocabulary's tensors are larger."""
    broadcast = config_of(weights={"transport": "broadcast"})
    (size,) = bucket_bytes(broadcast, read_architecture(llama))
    table = 128256 * 4096 * 2
    assert table < size <= 2 * table
    assert trainer_memory(broadcast, llama)[-1].parts["weight buckets"] == size
    assert trainer_memory(config_of(), llama)[-1].parts["weight buckets"] == size  # colocated
    disk = config_of(weights={"transport": "disk"})
    assert "weight buckets" not in trainer_memory(disk, llama)[-1].parts
    parts = host(broadcast, llama).parts
    assert parts["outgoing weights"] == 4 * GIB


def test_experts_are_sharded_over_the_ranks_that_hold_the_same(tmp_path: Path) -> None:
    Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
    ).save_pretrained(tmp_path)
    together, apart = (
        trainer_memory(config_of({"parallel": {"data": 8, "expert": expert}}), tmp_path)[0]
        for expert in (1, 8)
    )
    experts = 4 * 64 * 3 * 256 * 256
    assert together.parts["weights"] - apart.parts["weights"] == pytest.approx(2 * experts * 7 / 8, rel=1e-3)
    # A rank has the optimizer state of an eighth of the experts either way.
    assert together.parts["optimizer"] == pytest.approx(apart.parts["optimizer"], rel=1e-3)


def test_routes_are_counted_where_they_are_kept(tmp_path: Path) -> None:
    """Six of eight layers have experts, of which a token has 8 of 300: two bytes each."""
    Qwen3MoeConfig(
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=300,
        num_experts_per_tok=8,
        moe_intermediate_size=64,
        mlp_only_layers=[0, 1],
    ).save_pretrained(tmp_path)

    def fitted(replay: str, packing: str = "tree") -> Fit:
        parallel = {"tensor": 2, "pipeline": 2, "data": 2}
        trainer = {"parallel": parallel, "max_tokens_per_pack": 16384, "routing_replay": replay}
        return fit(config_of(trainer, learning={"packing": packing}, plan={"device": "h100"}), tmp_path)

    none, trainer, rollout, flat = (
        fitted("none"), fitted("trainer"), fitted("rollout"), fitted("rollout", "flat")
    )  # fmt: skip
    for stage, (layers, in_flight) in enumerate(((2, 2), (4, 2))):
        before, *after = (plan.trainer[stage].parts["tree packs"] for plan in (none, trainer, rollout))
        assert after == [pytest.approx(before + in_flight * 16384 / 2 * layers * 8 * 2)] * 2
    all_of_step = [
        plan.trainer[0].subtotal(("tree packs", "other tree packs")) for plan in (none, trainer)
    ]  # at most three layers with experts a stage
    tokens = 32 * none.engine.expected_tree
    assert all_of_step[1] - all_of_step[0] == pytest.approx(tokens / 2 * 3 * 8 * 2)
    assert "engines' routes" not in {**none.host.parts, **trainer.host.parts}
    assert rollout.host.parts["engines' routes"] == rollout.engine.kv_tokens * 8 * 8 * 4
    # Trees, packs, and Ray's copy of these; all layers.
    routes = "routes of trees and packs"
    assert rollout.host.parts[routes] == 3 * 64 * rollout.engine.expected_tree * 8 * 8 * 2
    assert flat.host.parts[routes] > rollout.host.parts[routes]


@pytest.mark.parametrize(
    ("tokens", "gib"),
    # Not its flat packs: in the benchmark these attend by torch's flash attention.
    [(11520, 22.754), (20736, 31.742)],
    ids=["tree of 16 leaves", "tree that branches into 8 at once"],
)
def test_peaks_are_those_of_an_h200(tokens: int, gib: float, tmp_path: Path) -> None:
    """benchmarks/gpu/train_step.py, 2026-11-27: the 0.5B shape without Transformer Engine, one pack."""
    Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)
    trainer = {"recompute": "none", "max_tokens_per_pack": tokens}
    data = {"train": "unused", "prompts_per_step": 64, "max_prompt_tokens": 256}
    config = config_of(trainer, data=data, sampling={"max_response_tokens": 1536}, plan={"device": "h200"})
    stage, _ = trainer_memory(config, tmp_path)
    assert stage.total / GIB == pytest.approx(gib, rel=0.01)


def test_a_layout_that_does_not_divide_is_one_line(llama: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide the model's 8 key-value heads"):
        trainer_memory(config_of({"parallel": {"tensor": 16}}), llama)
