"""Counts the bytes of live tensors by watching every operation, as a device's allocator would."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make within it, until nothing refers to them.

    live: bytes now. peak: the most bytes since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: dict[int, int] = {}

    def restart(self) -> int:
        """Forget the peak; returns the live bytes."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _counts(leaf)}
        for leaf in tree_leaves(result):
            if _counts(leaf) and (key := leaf.untyped_storage()._cdata) not in given | self._counted.keys():
                self._add(leaf.untyped_storage(), key)
        return result

    def _add(self, storage: torch.UntypedStorage, key: int) -> None:
        self._counted[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._counted.pop(key)


def _counts(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided
