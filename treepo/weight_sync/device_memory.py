"""CUDA memory that processes share, and host memory that CUDA copies without a detour.

CUDA's calls go through cuda-bindings, which torch depends on. It has a CUDA runtime of its own, in the same
context as torch's, so that a call that fails here leaves no error behind that torch would report later.

torch's own sharing of tensors is not used: where its allocator has expandable segments, receivers would need
the right to trace the sender's process.
"""

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

_HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
_BLOCK = 2 << 20  # what cudaMalloc takes from the device; a part of a block would share all of it


class DeviceBytes:
    """Memory of a CUDA device, outside of torch's allocator, that other processes can open by its `handle`.

    bytes: uint8 [nbytes]. Raises RuntimeError if the device has too little memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        cudart = _runtime(device)
        size = -(-nbytes // _BLOCK) * _BLOCK
        try:
            self._pointer = _call(cudart, "cudaMalloc", size)
        except RuntimeError:
            torch.cuda.empty_cache()  # what torch holds and does not use
            self._pointer = _call(cudart, "cudaMalloc", size)
        self._device = device
        self.bytes = torch.as_tensor(_CudaArray(self._pointer, nbytes), device=device)

    @property
    def handle(self) -> bytes:
        """Opens the memory in another process on this machine. Raises RuntimeError without CUDA IPC."""
        handle = _call(_runtime(self._device), "cudaIpcGetMemHandle", self._pointer)
        return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)

    def close(self) -> None:
        """Free the memory. Neither `bytes` nor a process that has it open may be in use."""
        del self.bytes
        _call(_runtime(self._device), "cudaFree", self._pointer)


class _CudaArray:
    """Lets torch see CUDA memory as uint8 [nbytes] (numba's CUDA array interface, version 2)."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),  # not read-only
            "strides": None,
            "version": 2,
        }


def copy_from_handle(handle: bytes, nbytes: int, device: torch.device) -> Tensor:
    """Copy the start of another process's `DeviceBytes`: uint8 [nbytes] on `device`.

    The other GPU need not be visible to this process. The memory is open only meanwhile, so its owner may
    free it afterwards. Raises RuntimeError if the memory cannot be opened.
    """
    cudart = _runtime(device)
    flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device)
    opened = cudart.cudaIpcMemHandle_t()
    ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)
    pointer = _call(cudart, "cudaIpcOpenMemHandle", opened, cudart.cudaIpcMemLazyEnablePeerAccess)
    try:
        kind = cudart.cudaMemcpyKind.cudaMemcpyDefault
        _call(cudart, "cudaMemcpyAsync", flat.data_ptr(), pointer, nbytes, kind, stream.cuda_stream)
        stream.synchronize()
    finally:
        _call(cudart, "cudaIpcCloseMemHandle", pointer)
    return flat


class Pinned:
    """Host memory that is registered with CUDA until `release`. refused: why it could not be; empty if it
    could. device: None if it need not be.
    """

    def __init__(self, host: Tensor, device: torch.device | None) -> None:
        self.host, self._device = host, device
        self.refused = ""
        if device is not None:
            try:
                register(host, device)
            except RuntimeError as error:
                self.refused, self._device = str(error), None

    def release(self) -> None:
        """Undo the registration. No copy may be under way."""
        if self._device is not None:
            unregister(self.host, self._device)
            self._device = None


def register(host: Tensor, device: torch.device) -> None:
    """Let CUDA copy this host memory directly. Raises RuntimeError if the system refuses."""
    cudart = _runtime(device)
    _call(cudart, "cudaHostRegister", host.data_ptr(), host.nbytes, cudart.cudaHostRegisterPortable)


def unregister(host: Tensor, device: torch.device) -> None:
    _call(_runtime(device), "cudaHostUnregister", host.data_ptr())


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of host memory, complete when the device's current stream has reached it."""
    return host.to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until everything is done that was begun on the device's current stream."""
    torch.cuda.current_stream(device).synchronize()


def release_unused() -> None:
    """Return the memory that torch holds and does not use to the device."""
    torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """The GPU's UUID, the same in every process whatever CUDA_VISIBLE_DEVICES is."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def reason_against_opening(owner: str, opener: str) -> str:
    """Why a GPU should not read another GPU's memory, although it may be able to; empty if it should.

    owner, opener: their UUIDs. Over PCIe every byte would leave the owner once for each reader, which takes
    longer than one copy to the host's memory.
    """
    import pynvml

    if owner == opener:
        return ""
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "NCCL_P2P_DISABLE = 1, and its GPU is not the trainer's"
    try:
        pynvml.nvmlInit()
        first, second = (pynvml.nvmlDeviceGetHandleByUUID(name) for name in (owner, opener))
        status = pynvml.nvmlDeviceGetP2PStatus(first, second, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError as error:
        return f"its GPU is not the trainer's, and NVML does not say whether NVLink joins them: {error}"
    if status != pynvml.NVML_P2P_STATUS_OK:
        return "its GPU is not the trainer's, and no NVLink joins them"
    return ""


def _runtime(device: torch.device) -> Any:
    """CUDA's runtime, with `device` current in this thread. Raises RuntimeError."""
    try:
        from cuda.bindings import runtime  # type: ignore[reportAttributeAccessIssue]  # it has no stubs
    except ImportError as error:
        raise RuntimeError(f"cuda-bindings is not installed ({error})") from error
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    _call(runtime, "cudaSetDevice", index)
    return runtime


def _call(cudart: Any, name: str, *arguments: Any) -> Any:
    """Return the call's one value, None if it has none. Raises RuntimeError."""
    error, *values = getattr(cudart, name)(*arguments)
    if error != cudart.cudaError_t.cudaSuccess:
        raise RuntimeError(f"{name}: {error.name}")
    return values[0] if values else None
