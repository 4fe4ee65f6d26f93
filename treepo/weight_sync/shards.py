"""The parts of a model's tensors that one engine rank reads, and their bytes one after another.

A rank's loader takes tensors of their full shape. Only the boxes that it reads are sent; the rest of the
tensor that it gets is memory that nobody wrote.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from treepo.weight_sync.wire import Box, Manifest, Shards, TensorInfo

ALIGNMENT = 16


def whole(info: TensorInfo) -> tuple[Box, ...]:
    return (tuple((0, size) for size in info.shape),)


def everything(tensors: Manifest) -> Shards:
    """What a rank reads that reads whole tensors."""
    return {tensor.name: whole(tensor) for tensor in tensors}


def box_of(shape: Sequence[int], view: Tensor) -> Box:
    """The box that a view covers of a contiguous tensor of this shape. If it is none: all of the first
    dimension's indices that it touches.
    """
    if view.numel() == 0:
        return tuple((0, 0) for _ in shape)
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    lengths = [1] * len(shape)
    free = [dim for dim, size in enumerate(shape) if size > 1]
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            continue
        dim = next((dim for dim in free if strides[dim] == stride and size <= shape[dim]), None)
        if dim is None:
            return _rows(shape, view)
        free.remove(dim)
        lengths[dim] = size
    offset, box = int(view.storage_offset()), []
    for stride, length, size in zip(strides, lengths, shape, strict=True):
        start, offset = divmod(offset, stride)
        if start + length > size:
            return _rows(shape, view)
        box.append((start, start + length))
    return tuple(box)


def _rows(shape: Sequence[int], view: Tensor) -> Box:
    row = prod(shape[1:])
    first = int(view.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return ((first // row, last // row + 1), *((0, size) for size in shape[1:]))


def union(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """Boxes that cover all of these and do not overlap."""
    distinct = sorted({box for box in boxes if all(start < stop for start, stop in box)})
    kept = [box for box in distinct if not any(_contains(other, box) for other in distinct if other != box)]
    if any(_overlap(one, other) for index, one in enumerate(kept) for other in kept[:index]):
        edges = list(zip(*kept, strict=True))
        kept = [tuple((min(a for a, _ in edge), max(b for _, b in edge)) for edge in edges)]
    return tuple(kept)


def _contains(outer: Box, inner: Box) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))


def _overlap(one: Box, other: Box) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))


def decoded(shards: Mapping[str, Any]) -> Shards:
    """Shards that have been JSON."""
    return {
        name: tuple(tuple((start, stop) for start, stop in box) for box in boxes)
        for name, boxes in shards.items()
    }


def read_bytes(tensors: Manifest, shards: Shards | None) -> int:
    """Bytes of the tensors' parts. shards: None if they are read whole."""
    if shards is None:
        return sum(tensor.nbytes for tensor in tensors)
    return sum(_box_bytes(tensor, box) for tensor in tensors for box in shards[tensor.name])


def part_bounds(tensors: Manifest, readers: Sequence[Shards | None]) -> list[tuple[int, int]]:
    """Where the bytes that each reader reads begin and end in a buffer that holds all of them."""
    bounds, start = [], 0
    for shards in readers:
        end = start + read_bytes(tensors, shards)
        bounds.append((start, end))
        start = -(-end // ALIGNMENT) * ALIGNMENT
    return bounds


def pieces(tensor: Tensor, name: str, shards: Shards | None) -> Iterator[Tensor]:
    """The parts of a tensor, in the order in which they are sent."""
    if shards is None:
        yield tensor
        return
    for box in shards[name]:
        yield tensor[tuple(slice(start, stop) for start, stop in box)]


def views(flat: Tensor, tensors: Manifest, shards: Shards | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the bytes that a reader gets, with their names. A tensor that it skips is left out."""
    start = 0
    for tensor in tensors:
        boxes = whole(tensor) if shards is None else shards[tensor.name]
        if boxes == whole(tensor):
            yield tensor.name, _typed(flat[start : start + tensor.nbytes], tensor.dtype, tensor.shape)
            start += tensor.nbytes
        elif boxes:
            scattered = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device=flat.device)
            for box in boxes:
                nbytes, shape = _box_bytes(tensor, box), [stop - first for first, stop in box]
                part = _typed(flat[start : start + nbytes], tensor.dtype, shape)
                scattered[tuple(slice(first, stop) for first, stop in box)].copy_(part)
                start += nbytes
            yield tensor.name, scattered


def _typed(part: Tensor, dtype: str, shape: Sequence[int]) -> Tensor:
    """The bytes as a tensor. Only a tensor that is not aligned is copied."""
    kind = getattr(torch, dtype)
    if part.data_ptr() % kind.itemsize:
        part = part.clone()
    return part.view(kind).view(shape)


def _box_bytes(tensor: TensorInfo, box: Box) -> int:
    return prod(stop - start for start, stop in box) * getattr(torch, tensor.dtype).itemsize
