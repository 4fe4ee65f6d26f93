"""Adapters on real Megatron-Core ranks: against transformers with low-rank terms by hand, against PEFT, and
every layout against one rank.
"""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from megatron_bridge.adapter_names import adapter_rules
from megatron_bridge.architecture import check_adapters, read_architecture
from megatron_bridge.peft_folder import ADAPTER, adapter_shapes
from tests.support import megatron_ranks
from tests.support.megatron_ranks import BatchCase, Case, Result
from tests.support.trainer_checks import (
    CLOSE,
    TEMPERATURE,
    Batch,
    assert_same_log_probs,
    assert_same_step,
    assert_the_same_bits,
    random_batch,
    trajectory_loss,
    write_model,
)
from tests.support.trainer_layouts import LAYOUTS
from treepo.config.learning import LearningConfig
from treepo.config.trainer import LoraConfig, ParallelConfig
from treepo.data.peft_names import weight_name
from treepo.errors import ConfigError
from treepo.learning import loss
from treepo.learning.packing import Pack

LORA = LoraConfig(rank=4, alpha=12.0)
ATTENTION = LoraConfig(rank=3, alpha=12.0, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
LORAS = {"qwen2_moe": ATTENTION}  # of the models that do not train LORA
SOME = LoraConfig(rank=2, alpha=8.0, targets=["v_proj", "up_proj"])
KL = LearningConfig(kl_coefficient=0.1)
# The first step moves B alone, because A's gradient is 0 while B is; later ones move both.
STEPS = 3
MODELS = {  # of every layout
    "tensor 2": ["qwen2", "qwen2-tied", "qwen3", "qwen3_moe"],
    "tensor 2, sequence whole": ["qwen3", "llama"],
    "tensor 2, expert 2": ["qwen3_moe", "qwen2_moe"],
    "pipeline 2": ["qwen2", "qwen2-tied"],
    "pipeline 2, interleaved": ["llama"],
    "data 2": ["qwen2"],
    "data 2, expert 2": ["qwen3_moe", "qwen2_moe"],
    "tensor 2, pipeline 2": ["qwen2-tied", "llama"],
    "tensor 2, data 2": ["qwen3, biased"],
    "pipeline 2, data 2, expert 2": ["qwen3_moe"],
    "context 2": ["qwen2", "qwen3"],
    "context 2, expert 2": ["qwen3_moe"],
    "context 2, tensor 2": ["qwen3"],
    "context 2, tensor 2, sequence whole": ["llama"],
    "context 2, pipeline 2": ["qwen2-tied"],
    "context 2, data 2": ["qwen2"],
}
PAIRS = [(layout, model) for layout, models in MODELS.items() for model in models]
NAMES = sorted({model for _, model in PAIRS})
RECOMPUTE = {
    "tensor 2, expert 2": "full",
    "pipeline 2": "full",
    "tensor 2, data 2": "selective",
    "context 2, pipeline 2": "full",
    "context 2, tensor 2": "selective",
}
BATCHES = {"data 2": "qwen2", "data 2, expert 2": "qwen3_moe", "context 2, data 2": "qwen2"}
VARIANT = "tensor 2, data 2"


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(seed=6, number=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(name, root / name) for name in NAMES}


def case_of(name: str, model: str, models: dict[str, Path], batch: Batch) -> Case:
    lora = LORAS.get(model, LORA)
    steps = [[batch.packed]] * STEPS
    return Case(name, models[model], steps, batch.denominator, temperature=TEMPERATURE, lora=lora)


@pytest.fixture(scope="module")
def one_rank(models, batch, tmp_path_factory) -> dict[str, Any]:
    """Every model on one rank, and the first one's variants."""
    cases = [case_of(name, name, models, batch) for name in NAMES]
    qwen2 = case_of("qwen2", "qwen2", models, batch)
    cases += [
        replace(qwen2, name="one step", steps=qwen2.steps[:1]),
        replace(qwen2, name="no adapters", lora=None, steps=qwen2.steps[:1]),
        replace(qwen2, name="flat", steps=[[batch.flat]] * STEPS),
        replace(qwen2, name="full", recompute="full"),
        replace(qwen2, name="selective", recompute="selective"),
        replace(qwen2, name="some", lora=SOME),
        replace(qwen2, name="kl", learning=KL, steps=with_reference(qwen2.steps)),
        replace(qwen2, name="offload all", offload="all"),
        replace(qwen2, name="bfloat16", dtype="bfloat16"),
        replace(qwen2, name="bfloat16, offload all", dtype="bfloat16", offload="all"),
    ]
    cases += [batch_case(model, model, models, batch) for model in sorted(set(BATCHES.values()))]
    return megatron_ranks.run(cases, tmp_path_factory.mktemp("ranks") / "one")


def batch_case(name: str, model: str, models: dict[str, Path], batch: Batch) -> BatchCase:
    """A whole batch in two mini-batches, with a KL term; a mixture replays the routes of its first pass."""
    plain = [replace(pack, old_log_prob=None) for pack in batch.packed]
    replicas = [[plain[:2], plain[3:]], [plain[2:3], []]]
    if name == model:
        replicas = [[plain[:2] + plain[3:]], [plain[2:3]]]
    mini_batches = [(packs, loss.denominator(packs, KL)) for packs in replicas]
    lora, replay = LORAS.get(model, LORA), "trainer" if "moe" in model else "none"
    layout = LAYOUTS[name.partition(":")[0]] if name != model else ParallelConfig()
    return BatchCase(
        f"{name}: batch", models[model], mini_batches, layout, KL, False, routing_replay=replay, lora=lora
    )


def with_reference(steps):
    return [
        [[replace(pack, reference_log_prob=pack.old_log_prob) for pack in packs] for packs in replicas]
        for replicas in steps
    ]


@pytest.fixture(scope="module")
def parallel(models, batch, tmp_path_factory) -> dict[str, Any]:
    """Results by "layout: model". Replicas get unequal numbers of packs, one even none in the second step."""
    cases = []
    for layout, model in PAIRS:
        case = replace(
            case_of(f"{layout}: {model}", model, models, batch),
            layout=LAYOUTS[layout],
            recompute=RECOMPUTE.get(layout, "none"),
            steps=replicas(layout, batch.packed),
        )
        cases.append(case)
        if layout == VARIANT:
            flat = replicas(layout, batch.flat)
            cases.append(replace(case, name=f"{layout}: flat", steps=flat))
            cases.append(replace(case, name=f"{layout}: offload", offload="all"))
            kl = with_reference(case.steps)
            cases.append(replace(case, name=f"{layout}: kl", learning=KL, steps=kl))
    cases += [batch_case(f"{layout}: {model}", model, models, batch) for layout, model in BATCHES.items()]
    root = tmp_path_factory.mktemp("ranks")
    results: dict[str, Any] = {}
    for ranks in (2, 4):
        group = [case for case in cases if case.layout.ranks == ranks]
        results |= megatron_ranks.run(group, root / str(ranks))
    return results


def replicas(layout: str, packs: list[Pack]) -> list[list[list[Pack]]]:
    if LAYOUTS[layout].data == 1:
        return [[packs]] * STEPS
    return [[packs[:1], packs[1:]], [packs, []], [packs[:2], packs[2:]]]


def assert_same_adapters(ours: Result, reference: Result) -> None:
    assert ours.adapters.keys() == reference.adapters.keys()
    for name, tensor in reference.adapters.items():
        torch.testing.assert_close(ours.adapters[name], tensor, **CLOSE, msg=name)


@pytest.mark.slow
def test_adapters_at_their_start_change_no_bit(one_rank) -> None:
    """B is 0: log-probs and the weights for the engines are the base's."""
    with_them, without = one_rank["one step"], one_rank["no adapters"]
    for ours, expected in zip(with_them.before[0], without.before[0], strict=True):
        assert np.array_equal(ours, expected)
    for name, tensor in without.initial.items():
        assert torch.equal(with_them.initial[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_changes_the_adapters_and_what_they_are_beside(name: str, one_rank) -> None:
    """Otherwise the comparisons below would prove nothing."""
    result = one_rank[name]
    lora = LORAS.get(name, LORA)
    beside = {weight_name(adapter) for adapter in result.adapters}
    assert {adapter.split(".")[-3] for adapter in result.adapters} == set(lora.targets)
    for tensor, weight in result.final.items():
        assert torch.equal(weight, result.initial[tensor]) == (tensor not in beside), tensor
    for adapter, tensor in result.adapters.items():
        assert tensor.abs().max() > 0, adapter
    assert 0 < result.metrics[1]["clip_high"] < 0.9


class ByHand(torch.nn.Module):
    """A network of transformers whose weights get B A by hand, in matrices that autograd follows."""

    def __init__(self, model: Path, adapters: dict[str, Tensor], lora: LoraConfig) -> None:
        super().__init__()
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
        self._network = [network]  # its parameters are none of ours
        self._scale = lora.alpha / lora.rank
        self.matrices = {name: tensor.clone().requires_grad_() for name, tensor in adapters.items()}

    def _weight(self, name: str, weight: Tensor) -> Tensor:
        """The weight of transformers with what is added to it."""
        if name.endswith("experts.gate_up_proj"):
            parts = [self._experts(name, part, len(weight)) for part in ("gate_proj", "up_proj")]
            return weight if parts[0] is None else weight + torch.cat(parts, dim=1)
        if name.endswith("experts.down_proj"):
            added = self._experts(name, "down_proj", len(weight))
        else:
            added = self._product(name.removesuffix(".weight"))
        return weight if added is None else weight + added

    def _experts(self, name: str, part: str, experts: int) -> Any:
        path = name.rpartition(".")[0]
        products = [self._product(f"{path}.{expert}.{part}") for expert in range(experts)]
        return None if products[0] is None else torch.stack(products)

    def _product(self, path: str) -> Any:
        a, b = (f"base_model.model.{path}.lora_{letter}.weight" for letter in "AB")
        return self._scale * self.matrices[b] @ self.matrices[a] if a in self.matrices else None

    def forward(self, tokens: Tensor) -> Any:
        (network,) = self._network
        weights = {name: self._weight(name, weight) for name, weight in network.named_parameters()}
        return functional_call(network, weights, (tokens,))


def initial_adapters(lora: LoraConfig, final: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters from which training begins."""
    adapters = {}
    for name, tensor in final.items():
        if ".lora_B." in name:
            adapters[name] = torch.zeros_like(tensor)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        uniform = torch.empty_like(tensor).uniform_(-1.0, 1.0, generator=generator)
        adapters[name] = uniform / tensor.shape[1] ** 0.5
    assert all(len(tensor) == lora.rank for name, tensor in adapters.items() if ".lora_A." in name)
    return adapters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3, biased", "qwen3_moe"])
def test_steps_are_those_of_low_rank_terms_in_transformers(name: str, one_rank, models, batch) -> None:
    """Autograd through transformers on whole trajectories, three steps of A and B."""
    result = one_rank[name]
    lora = LORAS.get(name, LORA)
    network = ByHand(models[name], initial_adapters(lora, result.adapters), lora)
    mine = network.matrices
    assert mine.keys() == result.adapters.keys()
    for step in range(STEPS):
        for parameter in mine.values():
            parameter.grad = None
        for pack in batch.flat:
            for start in np.flatnonzero(pack.source < 0):
                part = slice(start, pack.exit[start])
                trajectory_loss(network, pack, part, batch.denominator).backward()
        gradients = {key: parameter.grad for key, parameter in mine.items() if parameter.grad is not None}
        norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
        assert result.metrics[step]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for key, parameter in mine.items():
            clipped = gradients[key] * min(1.0, 1.0 / (norm + 1e-6))
            parameter.data -= clipped / (clipped.abs() + 1.0)  # Adam with betas of 0 and an epsilon of 1
    for key, parameter in mine.items():
        torch.testing.assert_close(result.adapters[key], parameter.data, **CLOSE, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_every_layout_is_one_rank(layout: str, name: str, parallel, one_rank) -> None:
    ours, reference = parallel[f"{layout}: {name}"], one_rank[name]
    assert_same_log_probs(ours, reference)
    assert_same_step(ours, reference)
    assert_same_adapters(ours, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), BATCHES.items())
def test_a_batch_is_the_same_at_every_layout(layout: str, name: str, parallel, one_rank) -> None:
    (ours, final), (reference, expected) = parallel[f"{layout}: {name}: batch"], one_rank[f"{name}: batch"]
    assert len(ours.taken) == len(reference.taken) == 2
    for update, other in zip(ours.updates, reference.updates, strict=True):
        for key in other.keys() - {"unique_tokens"}:
            assert update[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key
    # Before the first update the ratio is 1, so nothing is clipped, and the reference is the model itself.
    assert ours.updates[0]["clip_high"] == ours.updates[0]["reference_kl"] == 0
    assert ours.updates[1]["reference_kl"] > 0
    for tensor, weight in expected.items():
        torch.testing.assert_close(final[tensor], weight, **CLOSE, msg=tensor)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["flat", "full", "selective"])
def test_packing_and_recomputation_change_nothing(variant: str, one_rank) -> None:
    assert_same_step(one_rank[variant], one_rank["qwen2"])
    assert_same_adapters(one_rank[variant], one_rank["qwen2"])


@pytest.mark.slow
def test_packed_and_flat_are_the_same_at_a_layout(parallel) -> None:
    assert_same_step(parallel[f"{VARIANT}: flat"], parallel[f"{VARIANT}: qwen3, biased"])


@pytest.mark.slow
def test_offloading_changes_no_bit(one_rank, parallel) -> None:
    """Nor does a checkpoint that is written and loaded while everything is away."""
    assert_the_same_bits(one_rank["offload all"], one_rank["qwen2"])
    assert_the_same_bits(one_rank["bfloat16, offload all"], one_rank["bfloat16"])
    assert_the_same_bits(parallel[f"{VARIANT}: offload"], parallel[f"{VARIANT}: qwen3, biased"])


@pytest.mark.slow
def test_reference_is_the_model_without_adapters(one_rank, parallel) -> None:
    for result in (one_rank["kl"], parallel[f"{VARIANT}: kl"]):
        assert result.metrics[0]["reference_kl"] > 0
        values = [
            [array for replica in replicas for array in replica]
            for replicas in (result.before, result.reference, result.after)
        ]
        for before, reference, after in zip(*values, strict=True):
            np.testing.assert_array_equal(reference, before)
            assert not np.array_equal(after, before)


@pytest.mark.slow
def test_bfloat16_merges_in_float32(one_rank, models) -> None:
    result = one_rank["bfloat16"]
    saved = load_file(models["qwen2"] / "model.safetensors")
    for a in [name for name in result.adapters if ".lora_A." in name]:
        name, b = weight_name(a), a.replace("lora_A", "lora_B")
        assert result.adapters[a].dtype == result.final[name].dtype == torch.bfloat16
        product = result.adapters[b].float() @ result.adapters[a].float()
        merged = saved[name].bfloat16().float() + LORA.alpha / LORA.rank * product
        # Products of another shape may round otherwise in float32, and so now and then in bfloat16.
        same = result.final[name] == merged.bfloat16()
        assert same.float().mean() > 0.99
        torch.testing.assert_close(result.final[name], merged.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("key", [*NAMES, "some", *(f"{layout}: {name}" for layout, name in PAIRS)])
def test_export_gives_the_trainers_log_probs_in_peft(key: str, one_rank, parallel, models, batch) -> None:
    """The adapter in PEFT on the base, and the merged folder in transformers."""
    from peft import PeftModel

    result = one_rank.get(key) or parallel[key]
    model = models["qwen2" if key == "some" else key.rpartition(": ")[2]]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, result.export / ADAPTER)
    merged = AutoModelForCausalLM.from_pretrained(result.export, dtype=torch.float32)
    checked = 0
    # Packs of the first step: `after` has their log-probs, in the order of the replicas.
    for pack, after in zip(batch.packed, [a for replica in result.after for a in replica], strict=True):
        for last in np.flatnonzero(pack.exit == np.arange(len(pack)) + 1)[:4]:
            path = np.flatnonzero((np.arange(len(pack)) <= last) & (pack.exit > last))
            token = torch.from_numpy(pack.token[path]).long()
            for network in (adapted, merged):
                with torch.no_grad():
                    log_p = (network(token[None]).logits[0].float() / TEMPERATURE).log_softmax(-1)
                expected = log_p[:-1].gather(1, token[1:, None])[:, 0]
                np.testing.assert_allclose(after[path[1:]], expected, **CLOSE)
            checked += 1
    assert checked > 3


def test_a_rank_of_the_full_dimension_reproduces_any_step() -> None:
    """With a rank of the matrix's size and A orthogonal, B's gradient step moves the matrix along its own
    gradient: scale B A = scale^2 lr dW A^T A = scale^2 lr dW.
    """
    from megatron_bridge.adapters import Adapter

    torch.manual_seed(0)
    size, outputs = 6, 5
    weight, states = torch.randn(outputs, size), torch.randn(7, size)
    target = torch.randn(7, outputs)

    def objective(output: Tensor) -> Tensor:
        return ((output - target) ** 2).sum() + output.sin().sum()

    full = weight.clone().requires_grad_()
    objective(states @ full.T).backward()
    adapter = Adapter(
        LoraConfig(rank=size, alpha=2.0 * size),
        size,
        {"o_proj": outputs},
        lambda inner: inner,
        lambda parts: parts[0],
    )
    adapter.a["o_proj"].data = torch.linalg.qr(torch.randn(size, size))[0]
    adapter.b["o_proj"].data.zero_()
    a, b = adapter.a["o_proj"], adapter.b["o_proj"]
    objective(states @ weight.T + adapter.scale * (states @ a.T @ b.T)).backward()
    assert b.grad is not None
    assert full.grad is not None
    b.data -= 1e-3 * b.grad
    moved = adapter.merged(weight) - weight
    torch.testing.assert_close(moved, -1e-3 * adapter.scale**2 * full.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_every_linear_of_the_model_has_a_pair(name: str, models) -> None:
    architecture = read_architecture(models[name])
    lora, dimensions = LORAS.get(name, LORA), architecture.dimensions
    tensors = [tensor for rule in adapter_rules(architecture, lora.targets) for tensor in rule.tensors]
    mlps = dimensions.layers if architecture.experts is None else 0
    mlps += len(dimensions.sparse_layers) * dimensions.experts
    attention = len(set(lora.targets) & set(ATTENTION.targets))
    linears = attention * dimensions.layers + (len(lora.targets) - attention) * mlps
    assert len(tensors) == len(set(tensors)) == 2 * linears


@pytest.mark.parametrize("name", ["qwen2-tied", "llama", "qwen2_moe"])
def test_engines_expect_the_adapter_that_the_trainer_sends(name: str, models) -> None:
    """Both make the names from the model folder, one by its table, the other by its weight files."""
    from sglang_rollout.weight_update import adapter_shapes as expected
    from sglang_rollout.weight_update import checkpoint_shapes

    for lora in (ATTENTION, LORAS.get(name, LORA)):
        ours = adapter_shapes(read_architecture(models[name]), lora)
        assert ours == expected(checkpoint_shapes(models[name]), lora)


def test_experts_have_the_adapters_that_peft_reads(models) -> None:
    folder = models["qwen3_moe"]
    architecture = read_architecture(folder)
    check_adapters(folder, architecture, ATTENTION)
    check_adapters(folder, architecture, LORA)
    with pytest.raises(ConfigError, match=r"has up_proj, but PEFT .* for gate_proj, up_proj, down_proj tog"):
        check_adapters(folder, architecture, SOME)
    folder = models["qwen2_moe"]
    with pytest.raises(ConfigError, match=r"PEFT reads no adapters of the experts of a qwen2_moe .* v_proj"):
        check_adapters(folder, read_architecture(folder), LORA)
    check_adapters(folder, read_architecture(folder), ATTENTION)
