"""Log-probs of given tokens from hidden states, with the vocabulary sharded over tensor-parallel ranks.

Logits are float32 and exist for one chunk of tokens at a time; the backward pass computes them again. The
output matrix's gradient is summed over the chunks in float32. On CUDA one compiled kernel reads a chunk's
logits for all of its sums, and another turns them into their gradient.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_bridge.fusion import fused

CHUNK_BYTES = 1 << 29  # most bytes of float32 logits at once, on one rank


def token_log_probs(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, vocabulary: int, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-prob of `target` [T] under softmax(logits / temperature), and the distribution's entropy: float32
    [T].

    hidden: [T, hidden], the states that predict the targets. weight: this rank's rows of the output matrix,
    [V / ranks, hidden]. vocabulary: the whole model's; rows beyond it are padding with probability 0.
    """
    return _TokenLogProbs.apply(hidden, weight, target, temperature, vocabulary, group)  # type: ignore[return-value]  # torch leaves `apply` untyped


class _TokenLogProbs(torch.autograd.Function):
    """With z the logits, t the temperature, p = softmax(z / t) and H its entropy:

    d log p_y / dz = (onehot_y - p) / t  and  dH / dz = -p (log p + H) / t.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, vocabulary, group):
        first = group.rank() * len(weight)
        rows = weight[: max(0, vocabulary - first)]  # without the padding
        local = target - first
        dtype = torch.promote_types(weight.dtype, torch.float32)
        degree = torch.full((), temperature, dtype=dtype, device=weight.device)
        sums = torch.empty(4, len(hidden), dtype=dtype, device=weight.device)
        for chunk in _chunks(hidden, weight):
            sums[:, chunk] = fused(_sums)(_logits(hidden[chunk], rows), local[chunk], degree)
        top, total, mean, chosen = sums
        if group.size() > 1:
            highest = top.clone()
            all_reduce(highest, ReduceOp.MAX, group)
            below = top - highest
            scale = below.exp()
            sums = torch.stack([total * scale, (mean + below * total) * scale, chosen])
            all_reduce(sums, ReduceOp.SUM, group)
            top, (total, mean, chosen) = highest, sums
        log_total = total.log()
        entropy = log_total - mean / total
        ctx.save_for_backward(hidden, weight, local, top + log_total, entropy)
        ctx.rows, ctx.degree = len(rows), degree
        ctx.set_materialize_grads(False)
        return chosen - top - log_total, entropy

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, local, normaliser, entropy = ctx.saved_tensors
        grad_log_prob, grad_entropy = grads
        if grad_log_prob is None:
            grad_log_prob = torch.zeros_like(entropy)
        rows, grad_hidden = weight[: ctx.rows], torch.empty_like(hidden)
        main_grad = getattr(weight, "main_grad", None)  # Megatron-Core's sum over micro-batches
        grad_weight = main_grad
        if main_grad is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=entropy.dtype)
        for chunk in _chunks(hidden, weight):
            grad = fused(_logit_gradient)(
                _logits(hidden[chunk], rows),
                local[chunk],
                ctx.degree,
                normaliser[chunk],
                grad_log_prob[chunk],
                None if grad_entropy is None else (entropy[chunk], grad_entropy[chunk]),
                weight.dtype,
            )
            torch.mm(grad, rows, out=grad_hidden[chunk])
            if grad_weight is not None:  # the weight may be frozen
                _add_product(grad_weight[: ctx.rows], grad.t(), hidden[chunk])
            del grad  # before the next chunk's logits are made
        if grad_weight is None:
            return grad_hidden, *[None] * 5
        if main_grad is None:
            return grad_hidden, grad_weight.to(weight.dtype), *[None] * 4
        return grad_hidden, _already_added(weight), *[None] * 4


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * len(weight)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _logits(hidden: Tensor, rows: Tensor) -> Tensor:
    """The product in float32, which the softmax would otherwise get rounded to the weights' dtype."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(hidden, rows.t(), out_dtype=torch.float32)
    wide = torch.promote_types(rows.dtype, torch.float32)  # a CPU has no product with another output dtype
    return hidden.to(wide) @ rows.to(wide).t()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left` @ `right` to `total`, whose dtype may be wider."""
    if total.is_cuda and total.dtype != right.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # likewise
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _already_added(weight: Tensor) -> Tensor:
    """The gradient that autograd gets if the true one is in `main_grad`, by Megatron-Core's own protocol.

    Tied embeddings have a second gradient, to which autograd adds this one.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron-Core's mark
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _sums(logits: Tensor, local: Tensor, temperature: Tensor) -> Tensor:
    """Of each row z of `logits` / `temperature`: its maximum m, the sum of w = exp(z - m), the sum of
    w (z - m), and the value at `local`, 0 if that is another rank's. Float [4, T].
    """
    z = logits / temperature
    top = z.amax(dim=1)
    inside = (local >= 0) & (local < z.shape[1])
    chosen = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    below = z.sub_(top[:, None])
    weight = below.exp()
    mean = below.mul_(weight).sum(dim=1)
    return torch.stack([top, weight.sum(dim=1), mean, torch.where(inside, chosen, 0.0)])


def _logit_gradient(
    logits: Tensor,
    local: Tensor,
    temperature: Tensor,
    normaliser: Tensor,
    grad_log_prob: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the logits. normaliser: [T], log of the sum of exp(z / t) over the whole vocabulary.
    of_entropy: entropy and its gradient, if one flows.
    """
    log_p = (logits / temperature).sub_(normaliser[:, None])
    p = log_p.exp()
    columns = torch.arange(logits.shape[1], device=logits.device)
    grad = (columns == local[:, None]).to(p.dtype).sub_(p).mul_(grad_log_prob[:, None])
    if of_entropy is not None:
        entropy, grad_entropy = of_entropy
        grad.sub_(log_p.add_(entropy[:, None]).mul_(p).mul_(grad_entropy[:, None]))
    return grad.div_(temperature).to(dtype)
