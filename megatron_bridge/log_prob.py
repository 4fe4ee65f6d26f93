"""Log-probs of given tokens from hidden states, with the vocabulary sharded over tensor-parallel ranks.

Logits exist for one chunk of tokens at a time. Their softmax overwrites them, or is a second tensor if the
entropy is wanted too. With more than one chunk, the backward pass computes them again.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 1 << 29  # most bytes of float32 logits at once, on one rank


def token_log_probs(
    hidden: Tensor,
    project: Callable[[Tensor], Tensor],
    target: Tensor,
    temperature: float,
    vocabulary: int,
    group: ProcessGroup,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of `target` [T] under softmax(logits / temperature), and the entropy or None: float32 [T].

    hidden: [T, hidden], the states that predict the targets. project: maps rows of `hidden` to this rank's
    columns of the logits. vocabulary: the whole model's; columns beyond it are padding with probability 0.
    """

    def chunk_log_probs(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = project(hidden)
        pair = _VocabularyLogProb.apply(logits, target, temperature, vocabulary, group, with_entropy)
        return pair  # type: ignore[return-value]  # noqa: RET504  # torch leaves `apply` untyped

    part = -(-vocabulary // group.size())
    size = max(1, CHUNK_BYTES // (4 * part))
    if len(hidden) <= size:
        log_prob, entropy = chunk_log_probs(hidden, target)
    else:
        chunks = zip(hidden.split(size), target.split(size), strict=True)
        results = [
            checkpoint(chunk_log_probs, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
        log_prob = torch.cat([result[0] for result in results])  # type: ignore[index]  # checkpoint's result
        entropy = torch.cat([result[1] for result in results])  # type: ignore[index]  # is left untyped
    return log_prob, entropy if with_entropy else None


class _VocabularyLogProb(torch.autograd.Function):
    """Log-prob and entropy from one rank's columns of the logits [T, V / ranks].

    With p = softmax(z / t):  d log p_y / dz = (onehot_y - p) / t  and  dH / dz = -p (log p + H) / t.
    """

    @staticmethod
    def forward(ctx, logits, target, temperature, vocabulary, group, with_entropy):
        # Float32 logits are overwritten: the projection that made them keeps only its input for its backward.
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1.0:
            scaled.div_(temperature)
        first = group.rank() * scaled.shape[1]
        padding = scaled[:, max(0, vocabulary - first) :]
        padding.fill_(-torch.inf)
        top = scaled.amax(dim=1)
        if group.size() > 1:
            all_reduce(top, ReduceOp.MAX, group)
        scaled.sub_(top[:, None])
        local = target - first
        outside = (local < 0) | (local >= scaled.shape[1])
        local = local.masked_fill(outside, 0)[:, None]
        chosen = scaled.gather(1, local)[:, 0].masked_fill_(outside, 0.0)
        if with_entropy:
            weight = scaled.exp()
            padding.zero_()  # 0 x -inf would be NaN
            mean = torch.einsum("nv,nv->n", weight, scaled)
        else:
            weight = scaled.exp_()
            mean = torch.zeros_like(top)
        sums = torch.stack([chosen, weight.sum(dim=1), mean])
        if group.size() > 1:
            all_reduce(sums, ReduceOp.SUM, group)
        chosen, total, mean = sums
        log_total = total.log()
        entropy = log_total - mean / total
        ctx.save_for_backward(weight, total, entropy, local, outside)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return chosen - log_total, entropy

    @staticmethod
    def backward(ctx, *grads):
        weight, total, entropy, local, outside = ctx.saved_tensors
        grad_log_prob, grad_entropy = grads
        if grad_entropy is None:
            grad = weight.mul_((-grad_log_prob / total)[:, None])
        else:
            p = weight.div_(total[:, None])
            grad = (torch.special.xlogy(p, p) + p * entropy[:, None]).mul_(-grad_entropy[:, None])
            if grad_log_prob is not None:
                grad.sub_(p * grad_log_prob[:, None])
        if grad_log_prob is not None:
            grad.scatter_add_(1, local, grad_log_prob.masked_fill(outside, 0.0)[:, None])
        return (grad.div_(ctx.temperature).to(ctx.dtype), *[None] * 5)
