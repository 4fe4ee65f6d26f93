"""Reduces what the ranks measured in a step: metrics of the loss, and log-probs against the engines'."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bridge.schedule import MicroBatch
from treepo.learning.mismatch import LogProbMismatch
from treepo.learning.packing import Pack


def _sum(values: Iterable[float]) -> float:
    """The exact sum; inf or NaN if a value is, for which `math.fsum` may raise."""
    values = list(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


REDUCTIONS: dict[str, Callable[..., float]] = {"sum": _sum, "max": max, "min": min}


def log_prob_mismatch(packs: Sequence[Pack], batches: Sequence[MicroBatch]) -> LogProbMismatch:
    """Measure all replicas' packs by the log-probs that their micro-batches carry; the same on every rank."""
    mine = LogProbMismatch()
    if batches and reports():
        computed = [
            batch.pack["old_log_prob"][: len(pack)] for pack, batch in zip(packs, batches, strict=True)
        ]
        parts = np.split(torch.cat(computed).cpu().numpy(), np.cumsum([len(part) for part in computed[:-1]]))
        mine = LogProbMismatch.of(
            replace(pack, old_log_prob=part) for pack, part in zip(packs, parts, strict=True)
        )
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sum(everyone, LogProbMismatch())


def own_loss(metrics: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    """The sum of this rank's micro-batches' losses, a scalar; 0 before the last stage."""
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([nothing, *(entry["loss_sum"].double() for entry in metrics)]).sum()


def reduced(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Reduce metrics over all micro-batches and replicas; the last part of a key says how."""
    mine: list[dict[str, float]] = []
    if metrics and reports():
        keys = list(metrics[0])
        values = torch.stack([entry[key].double() for entry in metrics for key in keys])
        rows = values.view(len(metrics), len(keys)).tolist()  # waits for the device once
        mine = [dict(zip(keys, row, strict=True)) for row in rows]
    everyone: list[list[dict[str, float]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    entries = list(chain.from_iterable(everyone))
    return {key: REDUCTIONS[key.rsplit("_", 1)[1]](entry[key] for entry in entries) for key in entries[0]}


def reports() -> bool:
    """Whether this rank reports for its replica: tensor- and context-parallel ranks compute the same loss, so
    one does.
    """
    first = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
    return first and parallel_state.is_pipeline_last_stage()
