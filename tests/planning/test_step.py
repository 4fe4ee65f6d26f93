"""Engine memory, sampling and step time: conservation, monotonicity, and figures worked out by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bridge.architecture import read_architecture
from tests.support.naive_batching import StatedRates
from tests.support.tiny import write_tiny_qwen2, write_tiny_qwen3_moe
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.planning.hardware import GIB, device
from treepo.planning.memory.engine import EngineMemory, engine_memory, sglang_defaults
from treepo.planning.memory.engine_shard import engine_shard
from treepo.planning.nodes import footprint, transport_problem
from treepo.planning.simulation.rates import Prefill
from treepo.planning.simulation.workload import workload
from treepo.planning.speed.device_rates import DeviceRates
from treepo.planning.speed.packs import replica_work
from treepo.planning.speed.sampling import simulate, simulate_step
from treepo.planning.speed.step import step_time, sync_weights


def config(**settings: Any) -> RunConfig:
    """Settings of a key such as `engine_tensor` go into their section."""
    values: dict[str, Any] = {
        "out": "runs/x",
        "steps": 1,
        "model": {"path": "model"},
        "data": {"train": "train.jsonl", "prompts_per_step": 32, "max_prompt_tokens": 32},
        "sampling": {"segment_tokens": 16, "max_depth": 6, "max_response_tokens": 96, "width": 8},
        "plan": {"response_tokens": 40.0},
    }
    for name, value in settings.items():
        section, _, key = name.partition("_")
        values[section] = (values.get(section, {}) | {key: value}) if key else value
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("qwen2"), vocab_size=130)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), vocab_size=130)


def hugging_face_values(folder: Path) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def engine(config: RunConfig, folder: Path, left: float = 1.0 * GIB) -> EngineMemory:
    return engine_memory(config, folder, left)


@pytest.mark.parametrize("family", ["qwen2", "moe"])
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


def test_sglangs_default_is_its_documented_sum() -> None:
    # One H100 as nvidia-smi shows it: 512 + 8192 x 1.5 + 128 + 256 x 2 + 58 x 8 MiB are kept back.
    chosen = sglang_defaults(81559, tensor=1, graphs=True)
    assert chosen.chunk_tokens == 8192
    assert chosen.memory_fraction == round(1 - (512 + 12288 + 128 + 512 + 58 * 8) / 81559, 3)
    assert sglang_defaults(24 * 1024, tensor=1, graphs=False).chunk_tokens == 2048


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
    assert "its weights are" in str(engine(config(), qwen2, left=1e5).problem)
    problem = engine(config(engine_max_total_tokens=127), qwen2).problem
    assert problem is not None
    assert "holds 127 tokens, and one request may have 128" in problem
    assert "one tree is expected" in str(engine(config(engine_max_total_tokens=128), qwen2).problem)


def test_passes_take_longer_the_more_they_do(qwen2: Path, moe: Path) -> None:
    for folder in (qwen2, moe):
        architecture = read_architecture(folder)
        rates = {
            tensor: DeviceRates(
                device("h100"), architecture, engine_shard(architecture, tensor), tensor, value_bytes=2
            )
            for tensor in (1, 2)
        }
        one = rates[1]
        steps = [one.decode(requests, np.array([1000]))[0] for requests in (1, 8, 64, 4096)]
        assert steps == sorted(steps)
        assert one.prefill(Prefill(1, 64, 64, 2080)) < one.prefill(Prefill(64, 4096, 4096, 133_120))
        # Two ranks read half each; their all-reduces are constant.
        reading = [np.diff(rates[tensor].decode(1, np.array([1000, 2000])))[0] for tensor in (1, 2)]
        assert reading[0] == pytest.approx(2 * reading[1])


@pytest.mark.parametrize("mode", ["tree", "sequential"])
def test_a_step_decodes_what_its_trees_hold(qwen2: Path, mode: str) -> None:
    run = config(sampling_mode=mode)
    sampling = simulate_step(workload(run), StatedRates(), engine(run, qwen2), engines=2)
    assert len(sampling.trees) == 32
    assert sampling.share == 1
    if mode == "sequential":
        assert sampling.decoded_tokens == sampling.leaf_tokens
    else:
        assert sampling.decoded_tokens < sampling.leaf_tokens
    again = simulate_step(workload(run), StatedRates(), engine(run, qwen2), engines=2)
    assert (again.seconds, again.decoded_tokens) == (sampling.seconds, sampling.decoded_tokens)


@pytest.mark.parametrize(("engines", "max_trees"), [(8, 64), (4, 128), (1, 160), (2, 64)])
def test_a_part_of_a_step_tells_the_time_of_all_of_it(qwen2: Path, engines: int, max_trees: int) -> None:
    run = config(data_prompts_per_step=256, engine_max_total_tokens=4000)
    load, memory = workload(run), engine(run, qwen2)
    whole = simulate_step(load, StatedRates(), memory, engines, max_trees=256)
    part = simulate_step(load, StatedRates(), memory, engines, max_trees)
    assert part.share < whole.share == 1
    # The trees differ: an engine's last one alone may take a twentieth of its time.
    assert part.seconds == pytest.approx(whole.seconds, rel=0.12)
    assert part.decoded_tokens == pytest.approx(whole.decoded_tokens, rel=0.1)


def test_packs_hold_every_tree_once(qwen2: Path) -> None:
    run = config(trainer_parallel={"data": 4}, trainer_max_tokens_per_pack=4096, learning_mini_batches=2)
    sampling = simulate_step(workload(run), StatedRates(), engine(run, qwen2), engines=2)
    work = replica_work(run, sampling.trees)
    assert len(work) == 4
    trees = sampling.trees[:16]  # of one mini-batch
    assert sum(one.tokens for one in work) == sum(tree.unique_tokens() + len(tree.prompt) for tree in trees)
    (few,) = replica_work(run, sampling.trees, max_trees=3)  # of a replica's four
    assert few.tokens == 4 / 3 * sum(tree.unique_tokens() + len(tree.prompt) for tree in trees[:3])


def test_a_step_has_all_its_phases_and_more_devices_are_faster(qwen2: Path) -> None:
    runs = [
        config(engine_count=1),
        config(engine_count=4, trainer_parallel={"data": 4}),
        config(engine_count=1, trainer_recompute="full", learning_kl_coefficient=0.1),
    ]
    times = [step_time(run, qwen2, simulate(run, qwen2, engine(run, qwen2))) for run in runs]
    small, large, again = times
    assert list(small.phases) == ["sample", "log_probs", "train", "optimizer", "weight_sync"]
    assert all(phase.seconds > 0 and phase.note for phase in small.phases.values())
    assert large.phases["train"].seconds < small.phases["train"].seconds / 3
    assert large.phases["sample"].seconds < small.phases["sample"].seconds
    assert large.tokens_per_second > small.tokens_per_second
    assert again.phases["train"].seconds == pytest.approx(small.phases["train"].seconds * 4 / 3)
    assert again.phases["log_probs"].seconds == pytest.approx(small.phases["log_probs"].seconds * 2)


def test_a_sync_takes_longer_the_longer_its_way_is(qwen2: Path) -> None:
    settings: dict[str, Any] = {
        "placement": "split",
        "engine_count": 4,
        "trainer_parallel": {"tensor": 2},
        "plan_devices_per_node": 8,
    }
    seconds = {
        transport: sync_weights(config(weights_transport=transport, **settings), qwen2).seconds
        for transport in ("broadcast", "colocated", "disk", "host_broadcast")
    }
    assert sorted(seconds, key=lambda transport: seconds[transport]) == list(seconds)
    apart = sync_weights(
        config(weights_transport="broadcast", **settings | {"plan_devices_per_node": 2}), qwen2
    )
    assert apart.seconds > seconds["broadcast"]


def test_a_transport_that_cannot_reach_the_engines_is_a_problem() -> None:
    def problem(**settings: Any) -> str | None:
        given = config(**settings)
        return transport_problem(given, footprint(given))

    assert problem() is None
    apart = problem(plan_devices_per_node=2, trainer_parallel={"data": 4}, engine={"count": 4})
    assert apart is not None
    assert "2 nodes of 2 devices (host_broadcast and disk are allowed)" in apart
    # The second node's ranks have no engine beside them.
    assert problem(plan_devices_per_node=2, trainer_parallel={"data": 4}, engine={"count": 2}) is None
    assert "NCCL takes one process a GPU" in str(problem(weights_transport="broadcast"))
    assert problem(weights_transport="broadcast", placement="split") is None
