"""What `treepo plan` counts of adapters: by hand, and the same at every layout. Real ranks: test_memory."""

import pytest

from megatron_bridge.architecture import read_architecture
from tests.support.paths import ROOT
from treepo.config.load import load_config
from treepo.config.run import RunConfig
from treepo.config.trainer import LoraConfig, ParallelConfig
from treepo.planning.fit import fit
from treepo.planning.memory.adapters import adapter_count, adapters_of
from treepo.planning.memory.trainer import checkpoint_bytes, stage_shards, trainer_memory
from treepo.planning.memory.weight_sync import exported_bytes, sent_bytes

EXAMPLE = ROOT / "examples/models/qwen2.5-7b-lora.yaml"
QWEN = ROOT / "examples/architectures/Qwen2.5-7B"


def with_trainer(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=changes)})


def test_a_layers_adapters_by_hand() -> None:
    """28 layers: q, o are square, k and v have 4 heads of 128, the MLP has 18944 rows."""
    lora = LoraConfig(rank=32, alpha=64.0)
    hidden, keys, mlp = 3584, 512, 18944
    by_hand = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + mlp)
    assert adapter_count(read_architecture(QWEN), lora) == 28 * 32 * by_hand
    assert adapter_count(read_architecture(QWEN), None) == 0


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"tensor": 4, "pipeline": 2}, {"pipeline": 4}])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], ["up_proj"]])
def test_the_ranks_of_a_layout_hold_each_adapter_once(layout: dict[str, int], targets: list) -> None:
    """B of a matrix whose output is divided, A of one whose input is; the other is on every tensor rank."""
    parallel, lora = ParallelConfig.model_validate(layout), LoraConfig(rank=8, targets=targets)
    architecture = read_architecture(QWEN)
    held = [
        each
        for shard in stage_shards(QWEN, parallel)
        for chunk in shard.chunks
        for each in adapters_of(chunk, architecture, parallel, lora)
    ]
    whole = divided = 0
    for each in held:
        if (".adapter.a." in each.name) != each.name.endswith("down_proj"):
            whole += each.elements
        else:
            divided += each.elements
    assert whole + parallel.tensor * divided == adapter_count(architecture, lora)


def test_experts_have_adapters_of_their_own() -> None:
    """48 layers of 128 experts of 768 rows; each rank holds those of its own, whole."""
    folder, lora = ROOT / "examples/architectures/Qwen3-30B-A3B", LoraConfig(rank=8)
    architecture = read_architecture(folder)
    by_hand = 48 * 128 * 8 * 3 * (2048 + 768)
    assert adapter_count(architecture, lora, expert=True) == by_hand
    parallel = ParallelConfig(tensor=2, data=4, expert=8)
    (shard,) = stage_shards(folder, parallel)
    (chunk,) = shard.chunks
    held = [each for each in adapters_of(chunk, architecture, parallel, lora) if each.expert]
    assert sum(each.elements for each in held) == by_hand // 8


def test_a_sync_of_adapters_sends_and_joins_those_alone() -> None:
    merged, adapter = (load_config(EXAMPLE, [f"weights.send={send}"]) for send in ("merged", "adapter"))
    values = adapter_count(read_architecture(QWEN), adapter.trainer.lora)
    assert sent_bytes(merged, QWEN) == exported_bytes(merged, QWEN) == exported_bytes(adapter, QWEN)
    assert sent_bytes(adapter, QWEN) == 2 * values
    *_, syncing = trainer_memory(adapter, QWEN)
    assert "merging" not in syncing.parts
    assert syncing.parts["weight buckets"] == 2 * values  # less than one bucket
    whole, beside = fit(merged, QWEN).engine, fit(adapter, QWEN).engine
    assert "adapter" not in whole.memory.parts
    assert beside.memory.parts["adapter"] == 2 * values
    assert 0 < whole.kv_tokens - beside.kv_tokens < 2 * 2 * values / beside.stages[0].kv_values


def test_frozen_weights_have_neither_gradients_nor_optimizer_state() -> None:
    config = load_config(EXAMPLE)
    stage, *_ = trainer_memory(config, QWEN)
    values = adapter_count(read_architecture(QWEN), config.trainer.lora)
    assert stage.parts["gradients"] == pytest.approx(4 * values, rel=1e-3)
    assert stage.parts["optimizer"] == pytest.approx(12 * values, rel=1e-3)
    assert stage.parts["weights"] == pytest.approx(2 * (7_615_616_512 + values), rel=1e-6)
    assert checkpoint_bytes(config, QWEN) == 14 * values


def test_one_device_holds_a_model_with_adapters_only() -> None:
    config = load_config(EXAMPLE)
    assert fit(config, QWEN).problem is None
    without = fit(with_trainer(config, lora=None), QWEN)
    assert without.problem is not None


def test_the_reference_is_held_once() -> None:
    config = load_config(EXAMPLE, ["learning.kl_coefficient=0.01"])
    assert "reference weights" not in fit(config, QWEN).host.parts
    whole = fit(with_trainer(config, lora=None), QWEN).host.parts
    assert whole["reference weights"] > 2 * 2 * 7_000_000_000
