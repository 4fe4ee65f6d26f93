"""Memory that a trainer rank gives back while engines use its device: freed, or copied to the host.

Gradients are freed: the next step begins with zeros. `trainer.offload` says what is copied. Optimizer state
that is away is read and written where it is, on the host; weights that are away are, inside `readable`.
"""

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_bridge.optimizer_state import optimizer_parts


def return_free_memory() -> None:
    """Give the host memory that this process has freed back to the system.

    A checkpoint's copies come and go beside those of a step. The C library keeps the holes that they leave,
    and the process would grow from checkpoint to checkpoint.
    """
    ctypes.CDLL(None).malloc_trim(0)


class DeviceMemory:
    """Weights, gradients and optimizer state of one rank.

    offload: what is copied to the host, `none`, `optimizer` or `all`.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        offload: Literal["none", "optimizer", "all"],
    ) -> None:
        self._chunks = chunks
        self.weights = Weights(chunks)
        self._state = OptimizerState(optimizer, self.weights)
        self._offload = offload

    def give_back(self, weights: bool) -> None:
        """Free the gradients, and copy to the host what is offloaded; weights only if `weights`."""
        for chunk in self._chunks:
            chunk.offload_grad_buffers(empty_cache=False)
        if self._offload != "none":
            self._state.give_back()
        if self._offload == "all" and weights:
            self.weights.give_back()

    def take(self) -> None:
        """Take everything back. Gradients are 0 then."""
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=False)
        self._state.take()
        self.weights.take()


class Weights:
    """The weights as Megatron-Core keeps them: a few flat buffers, of which the parameters are views. Each
    frozen weight has memory of its own.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._buffers: list[Tensor] = [buffer.param_data for chunk in chunks for buffer in _buffers(chunk)]
        frozen = (parameter for chunk in chunks for parameter in chunk.parameters())
        self._buffers += [parameter.data.flatten() for parameter in frozen if not parameter.requires_grad]
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._bytes = [buffer.untyped_storage().nbytes() for buffer in self._buffers]
        self._host: list[Tensor] = []
        self._away = False

    def contains(self, tensor: Tensor) -> bool:
        """Whether the tensor is a view of the weights."""
        return any(_same_storage(tensor, buffer) for buffer in self._buffers)

    def room(self) -> list[Tensor]:
        """Room for a copy, in host memory that is locked for transfers."""
        return locked_like(self._buffers)

    def save(self, copies: Sequence[Tensor]) -> None:
        """Copy the weights into `copies`, a `room`. The host does not wait for it."""
        for copy, buffer in zip(copies, self._buffers, strict=True):
            copy.copy_(buffer, non_blocking=True)

    def load(self, copies: Sequence[Tensor]) -> None:
        """Overwrite the weights with `copies`, likewise."""
        for copy, buffer in zip(copies, self._buffers, strict=True):
            buffer.copy_(copy, non_blocking=True)

    def give_back(self) -> None:
        """Copy the weights to the host and free them here."""
        if self._away:
            return
        self._host = self._host or self.room()
        self.save(self._host)
        synchronize()
        for buffer in self._buffers:
            buffer.untyped_storage().resize_(0)
        self._away = True

    def take(self) -> None:
        """Undo `give_back`; every view of the weights is valid again."""
        if not self._away:
            return
        for buffer, size in zip(self._buffers, self._bytes, strict=True):
            buffer.untyped_storage().resize_(size)
        self.load(self._host)
        self._away = False

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Within it the parameters are on the host if the weights are away, and can be read and written."""
        if not self._away:
            yield
            return
        places = [parameter.data for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = self._on_host(parameter)
        try:
            yield
        finally:
            for parameter, place in zip(self._parameters, places, strict=True):
                parameter.data = place

    def _on_host(self, parameter: Tensor) -> Tensor:
        """The part of the host's copy that is this parameter's."""
        for copy, buffer in zip(self._host, self._buffers, strict=True):
            if _same_storage(parameter, buffer):
                start = parameter.storage_offset() - buffer.storage_offset()
                return copy[start : start + parameter.numel()].view(parameter.shape)
        raise AssertionError("a parameter outside Megatron-Core's buffers")


class OptimizerState:
    """Adam's averages and the master weights. The optimizer's tensors stay; their values move."""

    def __init__(self, optimizer: MegatronOptimizer, weights: Weights) -> None:
        self._tensors: list[Tensor] = [
            tensor
            for part in optimizer_parts(optimizer)
            for parameter, state in part.optimizer.state.items()
            for tensor in (parameter, *_tensors(state))
            if not weights.contains(tensor)  # float32 weights are their own master weights
        ]
        self._devices = [tensor.device for tensor in self._tensors]
        self._host: list[Tensor] = []
        self._away = False

    def give_back(self) -> None:
        """Copy the values to the host and free them here."""
        if self._away:
            return
        self._host = self._host or locked_like(self._tensors)
        for tensor, copy in zip(self._tensors, self._host, strict=True):
            copy.copy_(tensor, non_blocking=True)
        synchronize()
        for tensor, copy in zip(self._tensors, self._host, strict=True):
            tensor.data = copy
        self._away = True

    def take(self) -> None:
        """Undo `give_back`."""
        if not self._away:
            return
        for tensor, device in zip(self._tensors, self._devices, strict=True):
            tensor.data = torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)
        self._away = False


def _buffers(chunk: Any) -> Iterator[Any]:
    """Megatron-Core's buffers, typed as a method of torch's modules."""
    return chain(chunk.buffers, chunk.expert_parallel_buffers)


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    """Those of an optimizer's state that have a value for each of the parameter's, which are not counts."""
    return (value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0)


def locked_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Empty tensors like these in host memory, in one block that is locked for transfers.

    Torch's own allocator of locked memory rounds each tensor up to a power of two.
    """
    ends = np.cumsum([0, *(-(-tensor.nbytes // 64) * 64 for tensor in tensors)]).tolist()
    block = torch.from_numpy(_locked(ends[-1]))
    return [
        block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(ends[:-1], tensors, strict=True)
    ]


def _locked(size: int) -> np.ndarray:
    block = np.empty(size, dtype=np.uint8)
    if torch.cuda.is_available() and size:
        cuda: Any = torch.cuda.cudart()
        torch.cuda.check_error(cuda.cudaHostRegister(block.ctypes.data, size, 0))
        weakref.finalize(block, cuda.cudaHostUnregister, block.ctypes.data).atexit = False
    return block


def synchronize() -> None:
    """Wait for the device; a CPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
