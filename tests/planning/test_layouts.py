"""Layouts proposed in place of one that does not fit: valid, different, nearest first."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen3MoeConfig

from megatron_bridge.architecture import Architecture, check_layout, read_architecture
from treepo.config.run import RunConfig
from treepo.planning.layouts import Neighbour, neighbours


def config_of(**parallel: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "out": "run",
            "steps": 1,
            "model": {"path": "model"},
            "data": {"train": "none.jsonl", "prompts_per_step": 96, "max_prompt_tokens": 1024},
            "sampling": {"max_response_tokens": 7168},
            "learning": {"mini_batches": 3},
            "trainer": {"parallel": parallel},
            "engine": {"count": 4, "tensor": 2},
        }
    )


@pytest.fixture
def dense(tmp_path: Path) -> Architecture:
    """28 layers and 4 key-value heads, like Qwen2.5-7B."""
    Qwen2Config(
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, hidden_size=3584,
        intermediate_size=18944, tie_word_embeddings=False,
    ).save_pretrained(tmp_path / "dense")  # fmt: skip
    return read_architecture(tmp_path / "dense")


@pytest.fixture
def sparse(tmp_path: Path) -> Architecture:
    Qwen3MoeConfig(num_hidden_layers=48, num_experts=128, num_key_value_heads=4).save_pretrained(
        tmp_path / "sparse"
    )
    return read_architecture(tmp_path / "sparse")


def differences(config: RunConfig, neighbour: Neighbour) -> dict[str, Any]:
    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            found |= flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
        return found

    before, after = flat(config.model_dump()), flat(neighbour.config.model_dump())
    return {key: after[key] for key in after if after[key] != before[key]}


def test_neighbours_are_valid_and_say_what_they_change(dense: Architecture, sparse: Architecture) -> None:
    for architecture, config in (
        (dense, config_of(tensor=2, data=4)),
        (sparse, config_of(tensor=2, data=8, expert=4)),
        (dense, config_of(tensor=1, pipeline=2, virtual_pipeline=7, data=2)),
    ):
        found = list(islice(neighbours(config, architecture), 400))
        assert len(found) > 100
        for neighbour in found:
            check_layout(architecture, neighbour.config.trainer.parallel)
            assert differences(config, neighbour) == {**neighbour.changes, **neighbour.derived}
            devices = neighbour.config.trainer.parallel.ranks // config.trainer.parallel.ranks
            assert devices in (1, 2, 4)
            engine = neighbour.config.engine
            assert engine.count * engine.tensor == devices * config.engine.count * config.engine.tensor
            assert neighbour.config.engine.tensor <= config.plan.devices_per_node
        assert len({tuple(neighbour.overrides) for neighbour in found}) == len(found)


def test_one_small_change_comes_first_and_more_devices_last(dense: Architecture) -> None:
    found = list(neighbours(config_of(tensor=2, data=4), dense))
    first = [set(neighbour.changes) for neighbour in found[:2]]
    assert {"trainer.recompute"} in first
    assert {"trainer.max_tokens_per_pack"} in first
    assert any(set(neighbour.changes) == {"trainer.parallel.data"} for neighbour in found)
    more = [neighbour.config.trainer.parallel.ranks > 8 for neighbour in found]
    assert not any(more[:30])
    assert any(more)


def test_context_alone_is_one_step_away(dense: Architecture) -> None:
    """Its ranks come from the replicas: the pack is divided, and nothing else changes."""
    found = list(islice(neighbours(config_of(tensor=2, data=4), dense), 20))
    changes = [neighbour.overrides for neighbour in found]
    assert ["trainer.parallel.context=2", "trainer.parallel.data=2"] in changes


def test_a_layout_that_changes_more_than_one_that_fits_goes_beyond_it() -> None:
    config = config_of()
    one = Neighbour(config, {"trainer.recompute": "full"}, {})
    both = Neighbour(config, {"trainer.recompute": "full", "engine.tensor": 4}, {"engine.count": 2})
    assert both.goes_beyond(one)
    assert not one.goes_beyond(both)
    assert both.overrides == ["trainer.recompute=full", "engine.tensor=4", "engine.count=2"]
