"""A stream of named tensors, cut into pieces of a bounded size."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from treepo.protocols import Bucket


def buckets(tensors: Iterable[tuple[str, Tensor]], size: int) -> Iterator[Bucket]:
    """The tensors in buckets of at most `size` bytes, or of one tensor that is larger."""
    for group in grouped(tensors, size):
        flat = torch.cat([tensor.contiguous().view(torch.uint8).flatten() for _, tensor in group])
        yield Bucket(
            names=tuple(name for name, _ in group),
            dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in group),
            shapes=tuple(tuple(tensor.shape) for _, tensor in group),
            data=flat.cpu().numpy(),
        )


def grouped(tensors: Iterable[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors of at most `size` bytes together."""
    group: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in tensors:
        if group and used + tensor.nbytes > size:
            yield group
            group, used = [], 0
        group.append((name, tensor))
        used += tensor.nbytes
    if group:
        yield group
