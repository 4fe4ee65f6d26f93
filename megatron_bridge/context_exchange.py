"""Context-parallel ranks gather in parts: one part travels while the rank computes with another.

All parts set off at once. While the first is computed with, the others travel. In the backward pass the
gradients of the last part travel while those of the part before it are computed. Not hidden are the way of
the first part, and that of its gradients, which set off last.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gathered(parts: Sequence[Tensor], group: ProcessGroup) -> Iterator[Tensor]:
    """Yield each part of all the group's ranks, as soon as it has arrived: from [T, ...] of every rank
    [ranks * T, ...], in the order of the ranks. The backward pass sums the ranks' gradients, in their dtype.
    """
    exchanges = [_Exchange(group) for _ in parts]
    begun = [_Begin.apply(part, exchange) for part, exchange in zip(parts, exchanges, strict=True)]
    for part, exchange in zip(begun, exchanges, strict=True):
        yield _End.apply(part, exchange)


class _Exchange:
    """One part's way to all ranks, and its gradients' way back; one of both at a time."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._on_its_way: tuple[Any, Tensor] | None = None

    def gather(self, part: Tensor) -> None:
        whole = part.new_empty(len(part) * self._group.size(), *part.shape[1:])
        work = dist.all_gather_into_tensor(whole, part.contiguous(), group=self._group, async_op=True)
        self._on_its_way = work, whole

    def scatter(self, gradient: Tensor) -> Tensor:
        """Returns the tensor in which the sum arrives."""
        own = gradient.new_empty(len(gradient) // self._group.size(), *gradient.shape[1:])
        work = dist.reduce_scatter_tensor(own, gradient.contiguous(), group=self._group, async_op=True)
        self._on_its_way = work, own
        return own

    def arrived(self) -> Tensor:
        assert self._on_its_way is not None
        (work, tensor), self._on_its_way = self._on_its_way, None
        work.wait()
        return tensor


class _Begin(torch.autograd.Function):
    """Send the part off; in the backward pass, wait for its gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.gather(part)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.arrived(), None


class _End(torch.autograd.Function):
    """Wait for the part of all ranks; in the backward pass, send its gradient off."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.arrived()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.exchange.scatter(gradient), None  # `_Begin` passes it on after it has arrived
