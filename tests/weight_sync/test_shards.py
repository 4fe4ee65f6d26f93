"""Boxes of tensors: what a view covers, how boxes travel, and what a loader reads."""

from itertools import pairwise, product
from typing import Any

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sglang_rollout.loader_reads import loader_reads
from treepo.weight_sync.shards import box_of, decoded, part_bounds, pieces, read_bytes, union, views
from treepo.weight_sync.wire import Box, Shards, TensorInfo

SHAPES = st.lists(st.integers(1, 6), max_size=3).map(tuple)


def covered(shape: tuple[int, ...], box: Box) -> set[tuple[int, ...]]:
    del shape
    return set(product(*(range(start, stop) for start, stop in box)))


def touched(shape: tuple[int, ...], view: Tensor) -> set[tuple[int, ...]]:
    """The elements that a view of arange(numel) holds, as indices."""
    whole = torch.arange(max(torch.Size(shape).numel(), 1)).view(shape)
    flat = whole.flatten().as_strided(view.shape, view.stride(), view.storage_offset())
    return {tuple(int(i) for i in (whole == value).nonzero()[0]) for value in flat.flatten().tolist()}


@given(SHAPES, st.data())
def test_a_box_covers_what_its_view_touches_and_a_slice_s_box_nothing_else(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    view = torch.arange(torch.Size(shape).numel()).view(shape)
    exact = True
    for _ in range(data.draw(st.integers(0, 3))):
        action = data.draw(st.sampled_from(["slice", "select", "transpose", "flatten", "step"]))
        if view.dim() == 0 or view.numel() == 0:
            break
        dim = data.draw(st.integers(0, view.dim() - 1))
        if action == "slice":
            start = data.draw(st.integers(0, view.shape[dim] - 1))
            view = view.narrow(dim, start, data.draw(st.integers(1, view.shape[dim] - start)))
        elif action == "select":
            view = view.select(dim, data.draw(st.integers(0, view.shape[dim] - 1)))
        elif action == "transpose":
            view = view.transpose(0, dim)
        elif action == "step":
            view = view[::2]
            exact = False
        elif view.is_contiguous():
            view = view.flatten()
            exact = False
    box = box_of(shape, view)
    assert all(0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True))
    assert touched(shape, view) <= covered(shape, box)
    if exact and len(set(shape)) == len(shape) and 1 not in shape:
        assert touched(shape, view) == covered(shape, box)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    return tuple(
        (start, draw(st.integers(start + 1, size))) for start, size in zip(starts, shape, strict=True)
    )


@given(SHAPES, st.data())
def test_a_union_covers_its_boxes_and_overlaps_nowhere(shape: tuple[int, ...], data: st.DataObject) -> None:
    boxes = data.draw(st.lists(boxes_in(shape), max_size=4))
    merged = union(boxes)
    assert set().union(*(covered(shape, box) for box in boxes)) <= set().union(
        *(covered(shape, box) for box in merged)
    )
    assert sum(len(covered(shape, box)) for box in merged) == len(
        set().union(*(covered(shape, box) for box in merged))
    )
    assert len(union(boxes[:1])) == len(boxes[:1])


@given(st.lists(st.tuples(SHAPES, st.sampled_from(["float32", "bfloat16", "uint8"])), max_size=6), st.data())
def test_every_reader_finds_what_it_reads_and_skips_the_rest(
    described: list[tuple[tuple[int, ...], str]], data: st.DataObject
) -> None:
    tensors = {
        f"t{index}": torch.randint(0, 100, shape).to(getattr(torch, dtype))
        for index, (shape, dtype) in enumerate(described)
    }
    share = tuple(TensorInfo.of(name, tensor) for name, tensor in tensors.items())
    readers: list[Shards | None] = [
        {info.name: union(data.draw(st.lists(boxes_in(info.shape), max_size=2))) for info in share}
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    readers.append(None)
    bounds = part_bounds(share, readers)
    flat = torch.zeros(bounds[-1][1], dtype=torch.uint8)
    for (start, end), shards in zip(bounds, readers, strict=True):
        sent = [
            piece.contiguous().flatten().view(torch.uint8)
            for info in share
            for piece in pieces(tensors[info.name], info.name, shards)
        ]
        assert end - start == read_bytes(share, shards) == sum(map(len, sent))
        flat[start:end] = torch.cat([torch.empty(0, dtype=torch.uint8), *sent])
    assert all(before[1] <= after[0] for before, after in pairwise(bounds))
    for (start, end), shards in zip(bounds, readers, strict=True):
        found = dict(views(flat[start:end].clone(), share, shards))
        for info in share:
            boxes = shards[info.name] if shards is not None else (tuple((0, size) for size in info.shape),)
            assert (info.name in found) == bool(boxes)
            for box in boxes:
                index = tuple(slice(first, stop) for first, stop in box)
                assert found[info.name][index].equal(tensors[info.name][index])
        if shards is not None:
            assert decoded(orjson.loads(orjson.dumps(shards))) == shards


class Loader(nn.Module):
    """A model whose loader does what `load` says to each tensor."""

    def __init__(self, load: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 6), 7.0))
        self.padding = nn.Parameter(torch.full((4,), 7.0))
        self._load = load

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self._load(self, name, tensor)


def rows(model: Loader, _: str, tensor: Tensor) -> None:
    model.weight.data[:2].copy_(tensor[4:6])


def columns(model: Loader, _: str, tensor: Tensor) -> None:
    model.weight.data[:, :3].copy_(tensor.narrow(1, 3, 3)[:4])


def transposed(model: Loader, _: str, tensor: Tensor) -> None:
    model.weight.data.copy_(tensor.t()[:4, 2:8])


def cast(model: Loader, _: str, tensor: Tensor) -> None:
    model.weight.data[:1].copy_(tensor[3:4].to(torch.float64).contiguous()[:, :].float())


def joined(model: Loader, _: str, tensor: Tensor) -> None:
    model.weight.data.copy_(torch.cat([tensor[:2], tensor[6:8] * 2]))


def skipped(model: Loader, name: str, tensor: Tensor) -> None:
    del model, name, tensor


def by_value(model: Loader, _: str, tensor: Tensor) -> None:
    if float(tensor[0, 0]) > 0:
        model.weight.data.copy_(tensor[:4])


def padded(model: Loader, _: str, tensor: Tensor) -> None:
    model.padding.data[2:].fill_(0)
    model.padding.data[:2].copy_(tensor[0, :2])
    model.padding.data.mul_(2)


CASES: list[tuple[Any, tuple[Box, ...]]] = [
    (rows, (((4, 6), (0, 6)),)),
    (columns, (((0, 4), (3, 6)),)),
    (transposed, (((2, 8), (0, 4)),)),
    (cast, (((3, 4), (0, 6)),)),
    (joined, (((0, 2), (0, 6)), ((6, 8), (0, 6)))),
    (skipped, ()),
    (by_value, (((0, 8), (0, 6)),)),
    (padded, (((0, 1), (0, 2)),)),
]


@pytest.mark.parametrize("inference", [False, True])  # SGLang loads in either mode
@pytest.mark.parametrize(("load", "boxes"), CASES, ids=[load.__name__ for load, _ in CASES])
def test_a_loader_s_reads_are_found_and_nothing_is_written(
    load: Any, boxes: tuple[Box, ...], inference: bool
) -> None:
    model = Loader(load)
    share = tuple(TensorInfo(name, "float32", (8, 6)) for name in ("a", "b"))
    with torch.inference_mode(inference):
        assert loader_reads(model, share) == {"a": boxes, "b": boxes}
    for parameter in model.parameters():
        assert bool((parameter == 7).all())


def test_two_tensors_that_a_loader_joins_are_both_read() -> None:
    held: dict[str, Tensor] = {}

    def fused(model: Loader, name: str, tensor: Tensor) -> None:
        held[name] = tensor
        if len(held) == 2:
            model.weight.data.copy_(torch.cat([held["a"][:2], held["b"][2:4]]))

    share = tuple(TensorInfo(name, "float32", (8, 6)) for name in ("a", "b"))
    assert loader_reads(Loader(fused), share) == {"a": (((0, 2), (0, 6)),), "b": (((2, 4), (0, 6)),)}


def test_a_loader_that_never_takes_tensors_without_data_gets_all_of_them_whole() -> None:
    share = tuple(TensorInfo(f"t{index}", "float32", (8, 6)) for index in range(100))
    reads = loader_reads(Loader(by_value), share)
    assert set(reads.values()) == {(((0, 8), (0, 6)),)}
