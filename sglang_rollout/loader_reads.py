"""Finds out which parts of a checkpoint's tensors a model's `load_weights` reads on this rank.

The loader runs once on tensors that have shapes and no data. Whatever it does to them is recorded: a view is
followed, and any other use of a view reads all of it. Nothing is written to the model. No table of models or
layouts is needed: the loader itself says what the rank needs.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from treepo.errors import one_line, shortened
from treepo.weight_sync.shards import box_of, union, whole
from treepo.weight_sync.wire import Box, Manifest, Shards

_log = logging.getLogger(__name__)
_MOST_REFUSALS = 32  # tensors that the loader may refuse; after that, all others are whole


def loader_reads(model: nn.Module, tensors: Manifest) -> Shards:
    """The boxes of each tensor that the model's loader reads. A tensor that it does not take without data is
    whole.
    """
    record = _Record(next(model.parameters()).device)
    left, refused = list(tensors), 0
    places = _places(model)
    load: Any = model.load_weights
    with torch.no_grad(), _NothingWritten(model):
        while left and refused < _MOST_REFUSALS:
            given = record.fakes(left)
            try:
                load(given)
                break
            except Exception as error:  # whatever a loader does with a tensor's values
                at = record.last
                reason = shortened(one_line(error), 200)
                _log.warning(
                    "%s is sent whole: its loader fails without its values (%s)", left[at].name, reason
                )
                record.read[left[at].name] = list(whole(left[at]))
                left, refused = left[at + 1 :], refused + 1
    assert _places(model) == places, "the loader has replaced parameters"
    if refused == _MOST_REFUSALS:
        record.read |= {tensor.name: list(whole(tensor)) for tensor in left}
    return {tensor.name: union(record.read.get(tensor.name, [])) for tensor in tensors}


def _places(model: nn.Module) -> list[tuple[str, int, torch.Size]]:
    return [(name, tensor.data_ptr(), tensor.shape) for name, tensor in model.named_parameters()]


class _Record:
    """read: the boxes read of each tensor. last: the number of the tensor that the loader took last."""

    def __init__(self, device: torch.device) -> None:
        self.read: dict[str, list[Box]] = {}
        self.last = 0
        self._device = device

    def fakes(self, tensors: Manifest | Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        for self.last, info in enumerate(tensors):
            meta = torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
            yield info.name, _Fake(meta, self._device, _Whose(info.name, tuple(info.shape), meta, self))

    def add(self, whose: "_Whose", view: Tensor) -> None:
        self.read.setdefault(whose.name, []).append(box_of(whose.shape, view))


class _Whose:
    """The tensor of which a fake is a view."""

    def __init__(self, name: str, shape: tuple[int, ...], base: Tensor, record: _Record) -> None:
        self.name, self.shape, self.base, self.record = name, shape, base, record

    def owns(self, view: Tensor) -> bool:
        return view.untyped_storage()._cdata == self.base.untyped_storage()._cdata


class _Fake(Tensor):
    """A tensor without data. whose: None if it was computed from others."""

    meta: Tensor
    whose: _Whose | None

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, whose: _Whose | None) -> "_Fake":
        fake = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, meta.shape, meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=device
        )
        fake.meta, fake.whose = meta, whose
        return fake

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[reportAssignmentType]  # torch's own way

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fakes = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, cls)]
        if func._schema.is_mutable:
            _note(fakes)
            return args[0]  # nothing is written
        outputs = func(*tree_map(_without_data, args), **tree_map(_without_data, kwargs))
        made = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]
        if not made or any(_base(leaf, fakes) is None for leaf in made):
            _note(fakes)
        device = fakes[0].device
        return tree_map(
            lambda leaf: _Fake(leaf, device, _base(leaf, fakes)) if isinstance(leaf, Tensor) else leaf,
            outputs,
        )


def _without_data(leaf: Any) -> Any:
    if isinstance(leaf, _Fake):
        return leaf.meta
    if isinstance(leaf, Tensor):
        return leaf.to("meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _base(output: Tensor, fakes: Sequence[_Fake]) -> _Whose | None:
    return next((fake.whose for fake in fakes if fake.whose is not None and fake.whose.owns(output)), None)


def _note(fakes: Sequence[_Fake]) -> None:
    for fake in fakes:
        if fake.whose is not None:
            fake.whose.record.add(fake.whose, fake.meta)


class _NothingWritten(TorchDispatchMode):
    """Leaves the model's parameters and buffers as they are while the body runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        held = [*model.parameters(), *model.buffers()]
        self._held = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        changed = args[0] if func._schema.is_mutable and args else None
        if isinstance(changed, Tensor) and not isinstance(changed, _Fake):
            held = changed.untyped_storage()._cdata in self._held
            if held and not any(isinstance(leaf, _Fake) for leaf in tree_flatten((args, kwargs))[0]):
                return changed
        return func(*args, **kwargs)
