"""Log-probs on one rank against torch's log-softmax; test_trainer.py has several ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bridge import log_prob
from megatron_bridge.fusion import compiled

HIDDEN, VOCABULARY, PADDED = 7, 19, 24


class OneRank:
    """A process group with this process alone."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def compute(weight: Tensor, hidden: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    group: Any = OneRank()  # the only two methods that are called
    return log_prob.token_log_probs(hidden, weight, target, temperature, VOCABULARY, group)


def reference(weight: Tensor, hidden: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ weight[:VOCABULARY].T / temperature).log_softmax(-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(PADDED, HIDDEN, dtype=torch.float64, requires_grad=True)
    hidden = 3 * torch.randn(50, HIDDEN, dtype=torch.float64)
    return weight, hidden.requires_grad_(), torch.randint(0, VOCABULARY, (50,))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1 << 29, 4 * PADDED * 8])
def test_values_and_gradients(problem, temperature: float, chunk: int, monkeypatch) -> None:
    """In float64, so that only the order of sums differs; in one chunk and in chunks of a few tokens."""
    monkeypatch.setattr(log_prob, "CHUNK_BYTES", chunk)
    weight, hidden, target = problem
    a, b = torch.randn(2, len(hidden), dtype=torch.float64)
    results = []
    for log_p, entropy in (
        compute(weight, hidden, target, temperature),
        reference(weight, hidden, target, temperature),
    ):
        gradients = torch.autograd.grad((a * log_p + b * entropy).sum(), [weight, hidden])
        results.append([log_p, entropy, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_padding_of_the_vocabulary_counts_for_nothing(problem) -> None:
    weight, hidden, target = problem
    with torch.no_grad():
        weight[VOCABULARY:] = 100.0
    log_p, _ = compute(weight, hidden, target, 1.0)
    log_p.sum().backward()
    torch.testing.assert_close(log_p, reference(weight, hidden, target, 1.0)[0], rtol=1e-12, atol=1e-12)
    assert weight.grad is not None
    assert (weight.grad[VOCABULARY:] == 0).all()


@pytest.mark.parametrize("which", [0, 1], ids=["log-prob", "entropy"])
def test_gradient_of_one_result_alone(problem, which: int) -> None:
    weight, hidden, target = problem
    ours = torch.autograd.grad(compute(weight, hidden, target, 1.0)[which].sum(), [weight, hidden])
    theirs = torch.autograd.grad(reference(weight, hidden, target, 1.0)[which].sum(), [weight, hidden])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_logits_of_half_precision_are_not_rounded(problem) -> None:
    weight, hidden, target = problem
    weight, hidden = weight.detach().bfloat16(), hidden.detach().bfloat16()
    log_p, entropy = compute(weight, hidden, target, 1.0)
    assert log_p.dtype == entropy.dtype == torch.float32
    # Sums of seven float32 products, and one log-softmax of 19 terms against another. Logits in bfloat16
    # would be off by up to 0.1.
    for ours, theirs in zip(
        (log_p, entropy), reference(weight.float(), hidden.float(), target, 1.0), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_half_precision_gradients_of_chunks_are_summed_in_float32(problem, monkeypatch) -> None:
    """A thousand chunks of the same token: a sum in bfloat16 stops growing after 256 of them."""
    weight, hidden, target = problem
    weight = weight.detach().bfloat16().requires_grad_()
    hidden, target = hidden[:1].detach().bfloat16(), target[:1]
    once, *_ = torch.autograd.grad(compute(weight, hidden, target, 1.0)[0].sum(), weight)
    monkeypatch.setattr(log_prob, "CHUNK_BYTES", 1)
    often = compute(weight, hidden.expand(1000, -1), target.expand(1000), 1.0)[0].sum()
    summed, *_ = torch.autograd.grad(often, weight)
    # Both are rounded to bfloat16 once, by up to 2^-8.
    torch.testing.assert_close(summed.float(), 1000 * once.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_added_to_megatrons_sum(problem, tied: bool) -> None:
    """`main_grad` gets the output's part. Of tied embeddings autograd brings the other part."""
    weight, hidden, target = problem
    expected, *_ = torch.autograd.grad(reference(weight, hidden, target, 1.0)[0].sum(), weight)
    weight.main_grad = torch.ones_like(weight)
    weight.zero_out_wgrad = tied
    total = compute(weight, hidden, target, 1.0)[0].sum()
    (total + (3 * weight.sum() if tied else 0)).backward()
    torch.testing.assert_close(weight.main_grad, expected + 1, rtol=1e-12, atol=1e-12)
    assert weight.grad_added_to_main_grad
    if tied:
        assert (weight.grad == 3).all()


@pytest.mark.slow
def test_compiled_sums_and_gradients_are_those_of_plain_torch(problem, monkeypatch) -> None:
    """As on CUDA, but compiled for the CPU: two lengths of chunks and both kinds of gradient."""
    weight, hidden, target = problem
    monkeypatch.setattr(log_prob, "CHUNK_BYTES", 4 * PADDED * 8)
    results = []
    for fused in (lambda function: function, compiled):
        monkeypatch.setattr(log_prob, "fused", fused)
        log_p, entropy = compute(weight, hidden, target, 0.6)
        alone = torch.autograd.grad(log_p.sum(), [weight, hidden], retain_graph=True)
        both = torch.autograd.grad((log_p * entropy).sum(), [weight, hidden])
        results.append([log_p, entropy, *alone, *both])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-12, atol=1e-12)


def test_no_tokens_leave_the_graph_connected(problem) -> None:
    """A pack without trained tokens still takes part in a pipeline's backward pass."""
    weight, hidden, target = problem
    log_p, _ = compute(weight, hidden[:0], target[:0], 1.0)
    assert log_p.shape == (0,)
    log_p.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
