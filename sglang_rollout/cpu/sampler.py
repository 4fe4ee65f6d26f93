"""Seeded sampling for the CPU platform.

SGLang samples reproducibly only in its deterministic mode, whose kernels are for GPUs. Here each token is
drawn by inverting the cumulative distribution at a uniform number that depends on the request's seed and the
token's position alone, so the same request gives the same tokens whatever runs beside it, but for a
probability that rounding moves across that number: sums over a batch are rounded as its size makes them.
"""

from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler
from torch import Tensor

from sglang_rollout.cpu.seeded_draw import invert, uniform


class SeededSampler(Sampler):
    """SGLang's sampler, its draws seeded where the whole distribution is sampled from."""

    def _sample_from_probs(
        self, probs: Tensor, sampling_info: Any, positions: Tensor, simple_sampling_case: bool
    ) -> Tensor:
        if not simple_sampling_case:
            return super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
        number = uniform(sampling_info.sampling_seed.numpy(), positions.numpy())
        return invert(probs, torch.from_numpy(number))


def add_seeds(info: Any, _class: type, batch: Any, _vocab_size: int) -> None:
    """After `SamplingBatchInfo.from_schedule_batch`, which keeps the seeds in deterministic mode only."""
    seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64)
