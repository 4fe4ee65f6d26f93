"""Engine memory: shards of SGLang's ranks, the KV cache, the trees it holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bridge.architecture import Architecture, read_architecture
from tests.support.plan_configs import config, engine
from treepo.config.engine import EngineConfig
from treepo.errors import ConfigError
from treepo.planning.fit import fit
from treepo.planning.memory.engine import sglang_defaults
from treepo.planning.memory.engine_shard import EngineShard, engine_shards


def engine_shard(architecture: Architecture, tensor: int) -> EngineShard:
    """A rank of an engine without stages."""
    (shard,) = engine_shards(architecture, EngineConfig(tensor=tensor))
    return shard


def hugging_face_values(folder: Path) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["qwen2", "moe", "shared_expert"])
def test_one_engine_rank_has_the_whole_model(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    architecture = read_architecture(folder)
    padding = 2 * (192 - 130) * architecture.hidden  # two tables, padded to a multiple of 64
    values = hugging_face_values(folder)
    assert engine_shard(architecture, 1).parameters == values + padding


def test_engine_ranks_divide_all_but_norms_and_too_few_key_value_heads(qwen2: Path) -> None:
    architecture = read_architecture(qwen2)  # 4 heads, 2 key-value heads of 16, hidden 64, 2 layers
    one, two, four = (engine_shard(architecture, tensor) for tensor in (1, 2, 4))
    norms = 2 * 2 * 64 + 64
    assert 2 * (two.parameters - norms) == one.parameters - norms
    assert (one.kv_values, two.kv_values, four.kv_values) == (2 * 2 * 32, 2 * 2 * 16, 2 * 2 * 16)
    doubled = 4 * (2 * 2 * 16 * (64 + 1)) / 2  # keys and values, with biases: twice what two ranks have
    assert 4 * (four.parameters - norms) == one.parameters - norms + doubled
    with pytest.raises(ConfigError, match=r"engine.tensor = 3 does not divide the model's 4 attention heads"):
        engine_shard(architecture, 3)


@pytest.mark.parametrize("family", ["qwen2", "moe", "shared_expert"])
@pytest.mark.parametrize(("pipeline", "tensor", "expert"), [(2, 1, 1), (2, 2, 2), (1, 2, 2), (1, 2, 1)])
def test_stages_and_parts_of_experts_add_up_to_the_model(
    family: str, pipeline: int, tensor: int, expert: int, request: pytest.FixtureRequest
) -> None:
    """Expert parts divide whole experts instead of rows, so a rank holds as many parameters of them. Stages
    divide layers and nothing else.
    """
    architecture = read_architecture(request.getfixturevalue(family))
    if architecture.experts is None and expert > 1:
        with pytest.raises(ConfigError, match=r"engine.expert = 2: the model has no experts"):
            engine_shards(architecture, EngineConfig(tensor=tensor, pipeline=pipeline, expert=expert))
        return
    stages = engine_shards(architecture, EngineConfig(tensor=tensor, pipeline=pipeline, expert=expert))
    whole = engine_shard(architecture, tensor)
    assert len(stages) == pipeline
    assert sum(stage.parameters for stage in stages) == whole.parameters
    assert sum(stage.kv_values for stage in stages) == whole.kv_values
    assert sum(stage.experts for stage in stages) == whole.experts
    assert stages[0].embedding == whole.embedding
    assert stages[-1].output == whole.output


def test_layers_that_do_not_divide_go_to_the_last_stages(qwen2: Path) -> None:
    """As SGLang's get_pp_indices. A tied output layer is copied to the last of several stages."""
    dimensions = replace(read_architecture(qwen2).dimensions, layers=7)
    architecture = replace(read_architecture(qwen2), dimensions=dimensions, tied=True)
    stages = engine_shards(architecture, EngineConfig(pipeline=3))
    each = stages[0].kv_values // 2
    assert [stage.kv_values // each for stage in stages] == [2, 2, 3]
    assert [bool(stage.embedding) for stage in stages] == [True, False, False]
    assert [bool(stage.output) for stage in stages] == [False, False, True]
    with pytest.raises(ConfigError, match=r"engine.pipeline = 8 is more than the model's 7 layers"):
        engine_shards(architecture, EngineConfig(pipeline=8))


def test_the_stage_with_the_least_room_decides_on_the_cache(qwen2: Path) -> None:
    one, two = (engine(config(engine_pipeline=n), qwen2, 1e9) for n in (1, 2))
    assert two.kv_tokens > one.kv_tokens
    weights = [stage.parameters for stage in two.stages]
    assert two.memory.parts["weights"] == max(weights) * 2
    assert "of stage" in two.memory.owner


def test_sglangs_default_is_its_documented_sum() -> None:
    # One H100 as nvidia-smi shows it: 512 + 8192 x 1.5 + 128 + 256 x 2 + 58 x 8 MiB are kept back.
    chosen = sglang_defaults(81559, ranks=1, batch=256)
    assert chosen.chunk_tokens == 8192
    assert chosen.memory_fraction == round(1 - (512 + 12288 + 128 + 512 + 58 * 8) / 81559, 3)
    assert chosen.graphs_mib == 512 + 58 * 8
    assert sglang_defaults(24 * 1024, ranks=1, batch=0).chunk_tokens == 2048
    assert sglang_defaults(24 * 1024, ranks=1, batch=0).graphs_mib == 0


def test_graphs_stay_beside_a_trainer_that_shares_the_gpu(qwen2: Path) -> None:
    """512 MiB for batches of 256 paths, 32 trees of 8 leaves at once, and 58 x 8 MiB for prefill."""
    for placement, kept in (("colocated", True), ("split", False)):
        planned = fit(config(placement=placement), qwen2)
        assert planned.engine.graphs == (512 + 58 * 8) << 20
        for stage in planned.trainer:
            assert ("engine's CUDA graphs" in stage.parts) == kept
            assert not kept or stage.parts["engine's CUDA graphs"] == planned.engine.graphs
    assert engine(config(plan_device="cpu"), qwen2).graphs == 0


def test_the_cache_gets_what_the_weights_leave(qwen2: Path) -> None:
    whole, half = (engine(config(engine_memory_fraction=f), qwen2, 1e9) for f in (0.8, 0.4))
    for memory, budget in ((whole, 0.8e9), (half, 0.4e9)):
        used = memory.memory.parts["weights"] + memory.memory.parts["KV cache"]
        token_bytes = memory.memory.parts["KV cache"] / memory.kv_tokens
        assert budget - token_bytes < used <= budget
        assert memory.memory.total == pytest.approx(1e9, abs=token_bytes)
    assert whole.expected_trees > half.expected_trees > 0
    assert whole.longest_tree == 32 + 8 * 96
    assert whole.expected_tree < whole.longest_tree
    capped = engine(config(engine_max_total_tokens=5000), qwen2)
    assert capped.kv_tokens == 5000
    assert capped.problem is None


def test_an_engine_that_cannot_serve_says_why(qwen2: Path) -> None:
    assert "its weights are" in str(engine(config(), qwen2, free=1e5).problem)
    problem = engine(config(engine_max_total_tokens=127), qwen2).problem
    assert problem is not None
    assert "holds 127 tokens, and one request may have 128" in problem
    assert "one tree is expected" in str(engine(config(engine_max_total_tokens=128), qwen2).problem)
