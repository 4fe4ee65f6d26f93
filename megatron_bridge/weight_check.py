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
    vocabulary: int,
    device: torch.device,
) -> WeightCheck:
    """Reduce over all ranks: the largest weight, and the mean log-prob of the trained tokens. Collective.

    log_probs: [T] for each of this replica's micro-batches, under the new weights; none before the last
    stage.
    """
    largest = torch.stack([weight.detach().abs().max() for chunk in chunks for weight in chunk.parameters()])
    # A maximum over ranks may lose a NaN.
    most = torch.nan_to_num(largest.max().float(), nan=torch.inf).to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if log_probs and reports():
        for batch, values in zip(batches, log_probs, strict=True):
            trained = batch.pack["count_pos"] + batch.pack["count_neg"] > 0
            sums += torch.stack([values.double().where(trained, 0.0).sum(), trained.sum().double()])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    total, tokens = sums.tolist()
    return WeightCheck(most.item(), total / max(tokens, 1.0), int(tokens), vocabulary)
