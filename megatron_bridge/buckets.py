"""A stream of named tensors, cut into groups of a bounded size."""

from collections.abc import Iterable, Iterator

from torch import Tensor


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
