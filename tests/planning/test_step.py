"""A planned step: its sampling, packs, passes and weight sync."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bridge.architecture import read_architecture
from tests.support.naive_batching import StatedRates
from tests.support.plan_configs import config, engine
from treepo.config.engine import EngineConfig
from treepo.config.run import RunConfig
from treepo.planning.hardware import device
from treepo.planning.memory.engine_shard import engine_shards
from treepo.planning.memory.trainer import parameter_count
from treepo.planning.simulation.rates import Prefill
from treepo.planning.simulation.workload import workload
from treepo.planning.speed.device_rates import DeviceRates
from treepo.planning.speed.packs import replica_work
from treepo.planning.speed.sampling import simulate, simulate_step
from treepo.planning.speed.step import StepTime, step_time, sync_weights, trainer_phases


def test_passes_take_longer_the_more_they_do(qwen2: Path, moe: Path) -> None:
    for folder in (qwen2, moe):
        architecture = read_architecture(folder)
        rates = {
            tensor: DeviceRates(
                device("h100"),
                architecture,
                tuple(engine_shards(architecture, EngineConfig(tensor=tensor))),
                tensor,
                value_bytes=2,
                link=1e9,
                hop=1e9,
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


def test_stages_work_at_the_same_time(qwen2: Path) -> None:
    """Two stages that read half of the weights and of the cache each: a step of many requests takes as long
    to read the weights, half as long to read the cache and to compute, and twice the constant.
    """
    architecture = read_architecture(qwen2)
    one, two = (
        DeviceRates(
            device("h100"),
            architecture,
            tuple(engine_shards(architecture, EngineConfig(pipeline=stages))),
            tensor=1,
            value_bytes=2,
            link=1e9,
            hop=float("inf"),
        )
        for stages in (1, 2)
    )
    kv = np.array([0, 10**6, 2 * 10**6])
    reading = [np.diff(rates.decode(64, kv)) for rates in (one, two)]
    assert reading[0] == pytest.approx(2 * reading[1])
    assert two._fixed_seconds(32) == one._fixed_seconds(64)
    constant, batch = device("h100").pass_seconds, Prefill(1, 10**7, 10**7, 10**7)
    computing = one.prefill(batch) - constant, two.prefill(batch) - 2 * constant
    assert computing[0] == pytest.approx(2 * computing[1])


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
    works = replica_work(run, sampling.trees)
    assert [len(work) for work in works] == [4, 4]
    for work, trees in zip(works, (sampling.trees[:16], sampling.trees[16:]), strict=True):
        tokens = sum(tree.unique_tokens() + len(tree.prompt) for tree in trees)
        assert sum(one.tokens for one in work) == tokens
    ((few,),) = replica_work(run, sampling.trees, max_trees=3)  # of a replica's four
    tokens = sum(tree.unique_tokens() + len(tree.prompt) for tree in sampling.trees[:3])
    assert few.tokens == 4 / 3 * tokens


def planned(run: RunConfig, folder: Path) -> StepTime:
    sampling = simulate(run, folder, engine(run, folder))
    return step_time(trainer_phases(run, folder, sampling.trees), sampling)


def test_a_step_has_all_its_phases_and_more_devices_are_faster(qwen2: Path) -> None:
    runs = [
        config(engine_count=1),
        config(engine_count=4, trainer_parallel={"data": 4}),
        config(engine_count=1, trainer_recompute="full", learning_kl_coefficient=0.1),
    ]
    times = [planned(run, qwen2) for run in runs]
    small, large, again = times
    assert list(small.phases) == ["sample", "log_probs", "train", "optimizer", "weight_sync"]
    assert all(phase.seconds > 0 and phase.note for phase in small.phases.values())
    assert large.phases["train"].seconds < small.phases["train"].seconds / 3
    assert large.phases["sample"].seconds < small.phases["sample"].seconds
    assert large.tokens_per_second > small.tokens_per_second
    assert again.phases["train"].seconds == pytest.approx(small.phases["train"].seconds * 4 / 3)
    assert again.phases["log_probs"].seconds == pytest.approx(small.phases["log_probs"].seconds * 2)


def test_slices_share_a_step_and_send_keys_and_values(qwen2: Path) -> None:
    """Each of two ranks computes half; over a slow network the exchange costs more than is gained."""
    settings = {"trainer_max_tokens_per_pack": 4096, "plan_devices_per_node": 2}
    alone = planned(config(**settings), qwen2).phases["train"]
    run = config(**settings, trainer_parallel={"context": 2})
    divided = planned(run, qwen2).phases["train"]
    assert alone.seconds / 2 < divided.seconds < alone.seconds
    assert "keys and values to each rank" in divided.note
    assert "keys and values" not in alone.note
    slow = {**settings, "plan_devices_per_node": 1, "plan_network_gb_per_second": 0.001}
    apart = config(**slow, trainer_parallel={"context": 2}, placement="split", weights_transport="disk")
    assert planned(apart, qwen2).phases["train"].seconds > alone.seconds
    sampling = simulate_step(workload(run), StatedRates(), engine(run, qwen2), engines=1)
    assert all(1 <= one.fullest < 1.1 for work in replica_work(run, sampling.trees) for one in work)


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


def test_more_sources_and_more_ranks_of_an_engine_make_a_sync_faster(qwen2: Path) -> None:
    """Eight sources, or engines of eight ranks, alone change little: the other side's links are as slow."""

    def seconds(data: int, tensor: int) -> float:
        settings: dict[str, Any] = {
            "placement": "split",
            "weights_transport": "broadcast",
            "trainer_parallel": {"data": data},
            "engine_tensor": tensor,
            "plan_devices_per_node": 32,
        }
        return sync_weights(config(**settings), qwen2).seconds

    one = seconds(1, 1)
    assert seconds(8, 1) == pytest.approx(one, rel=0.1)
    assert seconds(1, 2) == pytest.approx(one, rel=0.1)
    assert one / 2.2 < seconds(8, 2) < one / 1.8


def test_a_sync_counts_what_the_trainer_offloads(qwen2: Path) -> None:
    """There and back over pinned memory, if engines share its devices."""

    def seconds(placement: str, offload: str) -> float:
        settings = config(placement=placement, trainer_offload=offload, weights_transport="disk")
        return sync_weights(settings, qwen2).seconds

    shared = {offload: seconds("colocated", offload) for offload in ("none", "optimizer", "all")}
    moved = 2 * 12 * parameter_count(qwen2) / device("h100").pinned
    assert shared["optimizer"] - shared["none"] == pytest.approx(moved, rel=1e-3)
    assert shared["all"] - shared["none"] == pytest.approx(moved * 14 / 12, rel=1e-3)
    assert len({seconds("split", offload) for offload in ("none", "optimizer", "all")}) == 1
