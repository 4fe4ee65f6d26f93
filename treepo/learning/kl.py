"""Estimates of KL(policy || other) from one sampled token, chosen by name in `learning.kl_estimator`.

log_ratio is log(policy / other) of tokens that the policy sampled (Schulman, "Approximating KL divergence",
2020). As a loss on-policy, k1 has no gradient on average and k2 has the right one. This module does not
import torch, so that the configuration can read the names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for the annotations alone
    from torch import Tensor

KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {}


def register(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make the function a value of `learning.kl_estimator`, under its own name. It maps [T] to [T]."""
    KL_ESTIMATORS[function.__name__] = function
    return function


@register
def k1(log_ratio: Tensor) -> Tensor:
    """The log-ratio itself: unbiased, of either sign."""
    return log_ratio


@register
def k2(log_ratio: Tensor) -> Tensor:
    """Half its square: biased, never negative."""
    return 0.5 * log_ratio.square()


@register
def k3(log_ratio: Tensor) -> Tensor:
    """The ratio other / policy, minus 1, minus its logarithm: unbiased, never negative."""
    return (-log_ratio).expm1() + log_ratio
