"""Log-ratios of a micro-batch's tokens at the level of tokens, segments or leaves' responses.

At the levels of segments and leaves, all trained tokens of one share their mean log-ratio: the logarithm of
the geometric mean of their ratios, as in GSPO (arXiv:2507.18071). Their product, the unbiased ratio, explodes
with length: 500 tokens that differ by 1% each give 145.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from treepo.learning.policy_losses import Level


def at_level(log_ratio: Tensor, pack: Mapping[str, Tensor], trained: Tensor, level: Level) -> Tensor:
    """Give every token the mean log-ratio of its segment or response, or leave it its own: [T].

    log_ratio: [T], 0 for an untrained token, as in the result. trained: bool [T].
    pack: of its columns, `offset` is read for segments and `source` for leaves, whose packs are flat.
    """
    if level == "token":
        return log_ratio
    begins = pack["offset"] == 0 if level == "segment" else pack["source"] == -1
    return torch.where(trained, _mean_of_runs(log_ratio, trained, begins), 0.0)


def _mean_of_runs(values: Tensor, trained: Tensor, begins: Tensor) -> Tensor:
    """Give every token the mean of `values` over the trained tokens of its run: [T].

    values: [T], 0 if not trained. begins: bool [T], where runs begin; the first token does.
    """
    run = begins.cumsum(0) - 1
    # In float64, another order of the sum (a GPU adds in any) is lost when the mean is rounded to float32.
    total = torch.zeros_like(values, dtype=torch.float64).index_add_(0, run, values.double())
    number = torch.zeros_like(total).index_add_(0, run, trained.double())
    return (total / number.clamp(min=1.0))[run].to(values.dtype)
