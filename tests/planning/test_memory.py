"""Planned trainer memory against the allocations of real Megatron-Core ranks on CPU, part by part."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_bridge.architecture import read_architecture
from tests.support import megatron_ranks
from tests.support.memory_ranks import Measured, MemoryCase, measure
from treepo.config.run import RunConfig
from treepo.planning.memory import activations
from treepo.planning.memory.adapters import adapters_of
from treepo.planning.memory.host import trainer_node
from treepo.planning.memory.trainer import (
    checkpoint_bytes,
    largest_micro_batch,
    stage_shards,
    trainer_memory,
    work_in_layers,
    work_on_logits,
)
from treepo.planning.memory.weight_sync import exported_bytes

TOKENS = 1024
SIZES: dict[str, Any] = {
    "vocab_size": 2047,  # padded by tensor parallelism
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TOKENS,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
    "mlp_only_layers": [1],
    "head_dim": 64,
}
MODELS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied": Qwen2Config(**{**SIZES, "tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
    "qwen3_moe": Qwen3MoeConfig(**(SIZES | EXPERTS)),
}


@dataclass(frozen=True)
class Setting:
    model: str
    parallel: dict[str, Any]
    recompute: str = "none"
    dtype: str = "float32"
    entropy: float = 0.0
    chunk_bytes: int = 1 << 29
    saves: bool = False
    lora: dict[str, Any] | None = None


SETTINGS = {
    "one rank": Setting("qwen2", {}, saves=True),
    "one rank, selective": Setting("qwen3", {}, "selective", entropy=0.01),
    "one rank, full": Setting("qwen2-tied", {}, "full"),
    "one rank, full, bfloat16": Setting("qwen3", {}, "full", "bfloat16", saves=True),
    "one rank, chunks of logits": Setting("qwen2", {}, "full", chunk_bytes=1 << 20),
    "one rank, experts": Setting("qwen3_moe", {}),
    "one rank, experts, full": Setting("qwen3_moe", {}, "full"),
    "tensor 2": Setting("qwen2", {"tensor": 2}, saves=True),
    "tensor 2, selective": Setting("qwen3", {"tensor": 2}, "selective"),
    "tensor 2, full, bfloat16": Setting("qwen2", {"tensor": 2}, "full", "bfloat16"),
    "tensor 2, sequence whole": Setting("qwen2", {"tensor": 2, "sequence": False}),
    "tensor 2, expert 2": Setting("qwen3_moe", {"tensor": 2, "expert": 2}),
    "pipeline 2": Setting("qwen2", {"pipeline": 2}, dtype="bfloat16"),
    "pipeline 2, full": Setting("qwen2-tied", {"pipeline": 2}, "full"),
    "pipeline 2, interleaved": Setting("qwen3", {"pipeline": 2, "virtual_pipeline": 2}),
    "one rank, adapters": Setting("qwen2", {}, lora={"rank": 8}),
    "one rank, adapters, full, bfloat16": Setting("qwen2-tied", {}, "full", "bfloat16", lora={"rank": 8}),
    "tensor 2, adapters": Setting("qwen3", {"tensor": 2}, lora={"rank": 4, "targets": ["q_proj", "up_proj"]}),
    "context 2, expert 2, adapters": Setting(
        "qwen3_moe", {"context": 2, "expert": 2}, "full", lora={"rank": 4}
    ),
    "data 2": Setting("qwen3", {"data": 2}, "selective", "bfloat16"),
    "data 2, expert 2": Setting("qwen3_moe", {"data": 2, "expert": 2}, "full"),
    "context 2": Setting("qwen2", {"context": 2}),
    "context 2, selective": Setting("qwen3", {"context": 2}, "selective"),
    "context 2, expert 2, full": Setting("qwen3_moe", {"context": 2, "expert": 2}, "full"),
}


def run_config(setting: Setting, folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "out": "unused",
            "steps": 1,
            "model": {"path": folder, "dtype": setting.dtype},
            "data": {"train": "unused", "max_prompt_tokens": 1},
            "sampling": {"max_response_tokens": TOKENS - 1},
            "learning": {"entropy_coefficient": setting.entropy},
            "trainer": {
                "parallel": setting.parallel,
                "recompute": setting.recompute,
                "lora": setting.lora,
                "max_tokens_per_pack": TOKENS,
            },
            "plan": {"device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MemoryCase]:
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)
    return {
        name: MemoryCase(
            run_config(setting, root / setting.model),
            packs=4 if "pipeline" in setting.parallel else 2,
            chunk_bytes=setting.chunk_bytes,
            saves=f"{name} files" if setting.saves else "",
        )
        for name, setting in SETTINGS.items()
    }


@pytest.fixture(scope="module")
def measured(cases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measured]]:
    root = tmp_path_factory.mktemp("ranks")
    results: dict[str, list[Measured]] = {}
    for ranks in (1, 2):
        lives = [
            (name, measure, case)
            for name, case in cases.items()
            if case.config.trainer.parallel.ranks == ranks
        ]
        layout = lives[0][2].config.trainer.parallel
        results |= megatron_ranks.run_lives(lives, layout, root / str(ranks))
    return results


def compared(config: RunConfig, ranks: list[Measured]) -> Iterator[tuple[str, float, float]]:
    """Name, planned and allocated bytes of each part of each stage.

    Allocated is the mean over the stage's ranks, because experts are chosen unequally often.
    """
    folder, parallel = config.model.path, config.trainer.parallel
    *stages, syncing = trainer_memory(config, folder)
    batch = largest_micro_batch(config, read_architecture(folder))
    per_stage = parallel.stage_ranks
    for plan, shard in zip(stages, stage_shards(folder, parallel), strict=True):
        own = ranks[shard.stage * per_stage : (shard.stage + 1) * per_stage]
        kept = plan.parts["activations"] + plan.parts["tree packs"]
        work, logits = work_in_layers(batch, shard), work_on_logits(config, batch, shard)
        planned = {
            "weights": plan.parts["weights"],
            "gradients": plan.parts["gradients"],
            "optimizer": plan.parts["optimizer"],
            "gather_buffer": plan.parts["gather buffer"],
            "kept": kept,
            "work": work,
            "logits": logits,
            "fullest": kept + plan.parts["layer in work"] + plan.parts["logits"],
        }
        for name, value in planned.items():
            yield f"{plan.owner}: {name}", value, fmean(getattr(rank, name) for rank in own)
    joined = syncing.parts["joined tensor"] + syncing.parts.get("merging", 0.0)
    yield "joined", joined, max(rank.joined for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_part_is_what_ranks_allocate(
    name: str, cases, measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 15%, or 1% of the rank's memory: peaks of phases are differences of much larger numbers."""
    monkeypatch.setattr(activations, "CHUNK_BYTES", cases[name].chunk_bytes)
    rows = list(compared(cases[name].config, measured[name]))
    whole = max(plan.total for plan in trainer_memory(cases[name].config, cases[name].config.model.path))
    for part, planned, allocated in rows:
        assert planned == pytest.approx(allocated, rel=0.15, abs=0.01 * whole), part


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_are_those_that_ranks_hold(name: str, cases, measured) -> None:
    """Parameters exactly; weights, gradients and optimizer except for the gaps that Megatron-Core leaves."""
    config = cases[name].config
    parallel = config.trainer.parallel
    per_stage = parallel.stage_ranks
    lora, architecture = config.trainer.lora, read_architecture(config.model.path)
    for shard in stage_shards(config.model.path, parallel):
        held = {each.name: each.elements for each in shard.parameters}
        for chunk in shard.chunks:
            adapters = [] if lora is None else adapters_of(chunk, architecture, parallel, lora)
            held |= {each.name: each.elements for each in adapters}
        for rank in measured[name][shard.stage * per_stage : (shard.stage + 1) * per_stage]:
            assert sorted(rank.parameters.values()) == sorted(held.values())
        first = measured[name][shard.stage * per_stage].parameters
        assert first == held
    for part, planned, allocated in compared(config, measured[name]):
        if part.split()[-1] in ("weights", "gradients", "optimizer"):
            assert planned == pytest.approx(allocated, rel=1e-3), part


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.saves])
def test_checkpoint_and_export_are_as_large_as_planned(name: str, cases, measured) -> None:
    """Except for the files' headers. The host's copy of all ranks while they save is as planned, too."""
    config = cases[name].config
    first, *_ = ranks = measured[name]
    *stages, _ = trainer_memory(config, config.model.path)
    copied = trainer_node(config, config.model.path, stages).parts["checkpoint being written"]
    assert copied == pytest.approx(sum(rank.copied for rank in ranks), rel=0.02)
    assert checkpoint_bytes(config, config.model.path) == pytest.approx(first.checkpoint, rel=0.02)
    assert exported_bytes(config, config.model.path) == pytest.approx(first.export, rel=0.01)
