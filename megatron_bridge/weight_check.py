"""Measures the weights after a batch's optimizer steps; `treepo.learning.soundness` judges the result."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from megatron_bridge.schedule import MicroBatch
from megatron_bridge.step_metrics import reports
from treepo.learning.soundness import WeightCheck

CHECKED_TOKENS = 512
"""Trained tokens of each replica whose log-probs are computed."""


@torch.no_grad()
def weight_check(
    chunks: Sequence[Module],
    batches: Sequence[MicroBatch],
    log_probs: Sequence[Tensor],
    before: Sequence[MicroBatch],
    device: torch.device,
) -> WeightCheck:
    """Reduce over all ranks: the largest weight, and the mean log-prob of the trained tokens. Collective.

    log_probs: [T] for each of this replica's micro-batches, under the new weights; none before the last
    stage. before: micro-batches that begin with the same tokens, and carry their old log-probs.
    """
    weights = [weight.detach() for chunk in chunks for weight in chunk.parameters()]
    largest = torch.stack([torch.stack([-low, high]).max() for low, high in map(torch.aminmax, weights)])
    # A maximum over ranks may lose a NaN.
    most = torch.nan_to_num(largest.max().float(), nan=torch.inf, posinf=torch.inf).to(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    if log_probs and reports():
        for batch, values, earlier in zip(batches, log_probs, before, strict=False):  # `before` has more
            trained = (batch.pack["count_pos"] + batch.pack["count_neg"]).nonzero()[:, 0]
            old = earlier.pack["old_log_prob"][trained].double()
            size = torch.tensor(float(len(trained)), dtype=torch.float64, device=device)
            sums += torch.stack([values[trained].double().sum(), old.sum(), size])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    total, old_total, tokens = sums.tolist()
    return WeightCheck(most.item(), total / max(tokens, 1.0), old_total / max(tokens, 1.0), int(tokens))
