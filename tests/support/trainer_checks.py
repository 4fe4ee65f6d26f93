"""Models, packs and comparisons that the tests of real Megatron-Core ranks share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.megatron_ranks import Result
from tests.support.random_trees import random_tree
from tests.support.trainer_layouts import CONFIGS, VOCABULARY
from treepo.config.learning import LearningConfig
from treepo.learning import advantage, loss
from treepo.learning.packing import Pack, pack_flat, pack_trees
from treepo.tree import Tree

TEMPERATURE = 0.8
# Logits of some units in float32, summed in another order: a few 1e-6.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def write_model(name: str, folder: Path) -> Path:
    """A random model of CONFIGS, with norms and biases away from their initial values."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def with_old_log_prob(pack: Pack) -> Pack:
    """Old log-probs that depend on the token of the tree only, so that they are the same in any packing."""
    old = -4.5 + np.sin(7.0 * pack.token + pack.position)
    near = np.where(pack.version >= 0, old - 0.1 * np.cos(pack.position), 0.0)
    return replace(pack, old_log_prob=old.astype(np.float32), rollout_log_prob=near.astype(np.float32))


@dataclass(frozen=True)
class Batch:
    """Trees in packs of unequal lengths, some of them cut, and flat."""

    trees: list[Tree]
    packed: list[Pack]
    flat: list[Pack]
    denominator: float


def random_batch(seed: int, number: int) -> Batch:
    """A batch of random trees; old log-probs make the clips bind."""
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, f"p{i}", vocabulary=VOCABULARY, max_depth=4) for i in range(number)]
    learning = LearningConfig()
    advantages = advantage.estimate(trees, learning)
    longest = max(len(tree.prompt) + len(tree.response(leaf)) for tree in trees for leaf in tree.leaves)
    (packed,) = pack_trees(trees, advantages, longest + 10, 1)
    (flat,) = pack_flat(trees, advantages, longest + 10, 1)
    packed, flat = ([with_old_log_prob(pack) for pack in packs] for packs in (packed, flat))
    return Batch(trees, packed, flat, loss.denominator([packed], learning))


def assert_same_log_probs(ours: Result, reference: Result) -> None:
    """Before and after the steps, whatever replicas there were. The reference has one."""
    for attribute in ("before", "after"):
        values = [array for replica in getattr(ours, attribute) for array in replica]
        for array, expected in zip(values, getattr(reference, attribute)[0], strict=True):
            np.testing.assert_allclose(array, expected, **CLOSE)


def assert_same_step(ours: Result, reference: Result) -> None:
    for step, other in zip(ours.metrics, reference.metrics, strict=True):
        assert step.keys() == other.keys()
        for key in step.keys() - {"unique_tokens"}:
            assert step[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key
    assert ours.final.keys() == reference.final.keys()
    for name, tensor in reference.final.items():
        torch.testing.assert_close(ours.final[name], tensor, **CLOSE, msg=name)


def assert_the_same_bits(ours: Result, reference: Result) -> None:
    assert ours.metrics == reference.metrics
    assert ours.final.keys() == reference.final.keys()
    for name, tensor in reference.final.items():
        assert torch.equal(ours.final[name], tensor), name


def assert_step_of(gradients: Mapping[str, Tensor], result: Result) -> None:
    """The only step of a Case was that of these gradients, clipped to norm 1."""
    norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
    assert result.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for name, gradient in gradients.items():
        clipped = gradient * min(1.0, 1.0 / (norm + 1e-6))
        step = clipped / (clipped.abs() + 1.0)  # Adam with betas of 0 and an epsilon of 1
        torch.testing.assert_close(result.final[name], result.initial[name] - step, **CLOSE, msg=name)


SAVED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def saved_gradients(network) -> Iterator[tuple[str, torch.Tensor]]:
    """By the names that the tensors are saved under: transformers' experts are fused while they compute."""
    for name, parameter in network.named_parameters():
        layer, fused, part = name.partition("experts.")
        if not fused:
            yield name, parameter.grad
            continue
        names = SAVED[part]
        for expert, gradient in enumerate(parameter.grad):
            for saved, tensor in zip(names, gradient.chunk(len(names)), strict=True):
                yield f"{layer}experts.{expert}.{saved}.weight", tensor


def trajectory_loss(network, pack: Pack, tokens: slice, denominator: float) -> torch.Tensor:
    """The loss of one sequence of a flat pack."""
    fields = {name: torch.from_numpy(column[tokens]) for name, column in pack.columns().items()}
    token = fields["token"].long()
    log_p = (network(token[None]).logits[0] / TEMPERATURE).log_softmax(-1)
    log_prob = torch.cat([torch.zeros(1), log_p[:-1].gather(1, token[1:, None])[:, 0]])
    return loss.policy_loss(log_prob, fields, LearningConfig(), denominator)[0]
