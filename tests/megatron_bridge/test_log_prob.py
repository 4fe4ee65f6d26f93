"""Log-probs on one rank against torch's log-softmax; test_trainer.py has several ranks."""

import pytest
import torch
from torch import Tensor

from megatron_bridge import log_prob

HIDDEN, VOCABULARY, PADDED = 7, 19, 24


class OneRank:
    """A process group with this process alone."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def compute(
    weight: Tensor, hidden: Tensor, target: Tensor, temperature: float, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    return log_prob.token_log_probs(
        hidden,
        lambda rows: rows @ weight.T,
        target,
        temperature,
        VOCABULARY,
        OneRank(),  # type: ignore[arg-type]  # the only two methods that are called
        with_entropy,
    )


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
        assert entropy is not None
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


def test_gradient_of_the_log_prob_alone(problem) -> None:
    weight, hidden, target = problem
    log_p, entropy = compute(weight, hidden, target, 1.0, with_entropy=False)
    assert entropy is None
    ours = torch.autograd.grad(log_p.sum(), hidden)
    theirs = torch.autograd.grad(reference(weight, hidden, target, 1.0)[0].sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_softmax_of_half_precision_logits_is_in_float32(problem) -> None:
    weight, hidden, target = (x.detach() for x in problem)
    log_p, _ = compute(weight.bfloat16(), hidden.bfloat16(), target, 1.0)
    rounded = (hidden.bfloat16() @ weight[:VOCABULARY].bfloat16().T).float().log_softmax(-1)
    assert log_p.dtype == torch.float32
    # One float32 log-softmax of 19 terms against another.
    torch.testing.assert_close(log_p, rounded.gather(1, target[:, None])[:, 0], rtol=0, atol=1e-5)


def test_no_tokens_leave_the_graph_connected(problem) -> None:
    """A pack without trained tokens still takes part in a pipeline's backward pass."""
    weight, hidden, target = problem
    log_p, _ = compute(weight, hidden[:0], target[:0], 1.0)
    assert log_p.shape == (0,)
    log_p.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
